"""Layer database: for every group a nested order of its units, and the loss at each number of units kept."""
