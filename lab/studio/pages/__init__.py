"""The four pages. Each module has `build(studio)`, which lays the page out and says what its buttons do."""
