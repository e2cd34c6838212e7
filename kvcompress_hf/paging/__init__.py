"""Pages: who owns which, where a row's slots lie, and how they move."""
