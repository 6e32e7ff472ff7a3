"""The algorithms again, as slow NumPy float64 loops to compare with; nothing here imports the package under test."""
