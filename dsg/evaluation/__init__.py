"""Items -> values -> numbers, gathered over ranks and compared."""
