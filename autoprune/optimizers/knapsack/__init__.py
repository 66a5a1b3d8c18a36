"""Knapsack search: tables of single losses, exact front under true costs, and local improvement."""
