"""Systems of linear equations and factorisations: the matrix stays, columns and independent systems pass.

Multiply-accumulates are those of the leading order of the direct method that LAPACK uses (Golub and Van Loan, "Matrix
Computations", 4th edition, 2013, chapters 3 and 4). Iterative ones, such as eigenvalues, have no such number.
"""

from __future__ import annotations

from autoprune.structure.labels import Dims, Propagation
from autoprune.structure.rules.arithmetic import join_all
from autoprune.structure.rules.products import argument, dims_of
from autoprune.structure.rules.registry import Formula, Product, known, rule
from autoprune.structure.tracing.record import Op, Record


def _system(matrix: str, factor: float, solving: float) -> Formula:
    """Make the formula of systems: `factor` times the cube of their size, and `solving` times its square a column."""

    def count(record: Record, op: Op) -> list[Product]:
        a = argument(op, matrix)
        size = (a, len(record.values[a].shape) - 1)
        found: list[Product] = [(solving, [*dims_of(record, op.results()[0]), size])]
        return [*found, (factor, [*dims_of(record, a), size])] if factor else found

    return count


def _factorised(matrix: str, factor: float) -> Formula:
    """Make the formula of what costs `factor` times the cube of the size of a matrix."""

    def count(record: Record, op: Op) -> list[Product]:
        a = argument(op, matrix)
        return [(factor, [*dims_of(record, a), (a, len(record.values[a].shape) - 1)])]

    return count


@rule("linalg_solve_triangular", macs=_system("self", 0, 1 / 2), statistics=True)
def solution(flow: Propagation, op: Op) -> list[Dims]:
    """Keep equations and unknowns; right-hand sides pass, and so do systems, which are aligned from the right."""
    matrix, given = argument(op, "self"), argument(op, "B")
    a, b = flow.of(matrix), flow.of(given)
    row, column = (-2, -1) if op.args.get("left", True) else (-1, -2)
    for labels in (*a[-2:], b[row]):
        flow.freeze(op, labels, f"an unknown of the equations in {op.where()}")
    out: Dims = [None] * len(flow.record.values[op.results()[0]].shape)
    out[column] = b[column]
    for back in range(3, len(out) + 1):
        aligned = [
            labels[-back]
            for value, labels in ((matrix, a), (given, b))
            if back <= len(labels) and flow.record.values[value].shape[-back] != 1
        ]
        out[-back] = join_all(flow, op, aligned)
    return [out]


known("triangular_solve", macs=_system("A", 0, 1 / 2))
known("_linalg_solve_ex", macs=_system("A", 1 / 3, 1))
known("linalg_lu_solve", macs=_system("LU", 0, 1))
known("cholesky_solve", macs=_system("input2", 0, 1))
known("linalg_cholesky_ex", "cholesky", macs=_factorised("self", 1 / 6))
known("cholesky_inverse", macs=_factorised("self", 1 / 3))
known("linalg_lu_factor_ex", "linalg_lu", "_linalg_det", "_linalg_slogdet", macs=_factorised("A", 1 / 3))
known("linalg_inv_ex", macs=_factorised("A", 1))
