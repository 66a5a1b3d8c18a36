"""Journal: the SQLite file of a search, its rows, and readers that leave no trace."""
