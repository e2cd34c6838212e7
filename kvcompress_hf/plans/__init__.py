"""Plans: how much may stay (budget), what must stay (protect), and which slots go."""
