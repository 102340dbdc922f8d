"""Documentation, and the program that generates its generated pages."""
