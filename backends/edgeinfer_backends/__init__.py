"""One room for each backend; each is the sole importer of its framework, and lazily."""
