// Vercel's AI SDK, through both of the dialects that it speaks to others than their makers.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [, , url, modules] = process.argv;
const require = createRequire(`${modules}/`);
const { generateText, jsonSchema, streamText, tool } = require("ai");
const { createAnthropic } = require("@ai-sdk/anthropic");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");

const models = [
  createOpenAICompatible({ name: "dormouse", baseURL: `${url}/v1`, apiKey: "none", includeUsage: true })("smollm2"),
  createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" })("smollm2"),
];
const weather = tool({
  description: "The weather in a city.",
  inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
});
const question = { role: "user", content: "What is the weather like in Bergen?" };
const call = { type: "tool-call", toolCallId: "call_1", toolName: "weather", input: { city: "Bergen" } };
const output = { type: "text", value: "Rain in Bergen." };
const answered = { type: "tool-result", toolCallId: "call_1", toolName: "weather", output };
const turns = [question, { role: "assistant", content: [call] }, { role: "tool", content: [answered] }];
const limits = { temperature: 0, maxOutputTokens: 16, maxRetries: 0 };

for (const model of models) {
  const whole = await generateText({ model, messages: [question], ...limits });
  const stream = streamText({ model, messages: [question], ...limits, onError: ({ error }) => assert.fail(error) });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.ok(text.length > 0);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  const after = await generateText({ model, messages: turns, tools: { weather }, ...limits });
  assert.ok(after.text.length > 0);
  assert.ok(after.usage.inputTokens > whole.usage.inputTokens);
}
