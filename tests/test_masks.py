"""Masks and updates of layers against independent answers in NumPy and float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.importance.masks.layer import Layer, matrix_of_weight, weight_of_matrix
from autoprune.importance.masks.methods import METHODS, SCORED, solve
from autoprune.importance.masks.scores import lamp, magnitude, ria, wanda
from autoprune.importance.masks.support import fit_on_support
from autoprune.importance.masks.surgeon import spans_of, sparse_gpt
from autoprune.structure.slicing.zeros import Pattern

PATTERNS = ["unstructured", "2:4", "4:8", "1:4", "1x8", "4x4", "16x16"]
DAMPING = 0.01


def make_layer(
    outputs: int = 9, columns: int = 24, run: int | None = None, dtype: torch.dtype = torch.float64
) -> Layer:
    generator = torch.Generator().manual_seed(outputs + columns)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)  # correlated
    weight = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    return Layer(weight.to(dtype), (inputs.T @ inputs / len(inputs)).to(dtype), run or columns, DAMPING)


def damped(layer: Layer) -> np.ndarray:
    products = layer.products.double().numpy()
    return products + DAMPING * np.mean(np.diag(products)) * np.eye(len(products))


class TestPatterns:
    @pytest.mark.parametrize("name", PATTERNS)
    def test_names_come_back(self, name: str):
        assert Pattern.parse(name).name == name

    @pytest.mark.parametrize("name", ["", "2:2", "4:2", "0:4", "1x1", "x4", "2:4:8", "dense", "4*4", " 2:4", 24])
    def test_others_are_refused_with_the_forms_that_there_are(self, name):
        with pytest.raises(ValueError, match="pattern must be 'unstructured', N of M inputs that stay such as '2:4'"):
            Pattern.parse(name)

    @pytest.mark.parametrize("name", PATTERNS)
    @pytest.mark.parametrize("shape", [(16, 32), (33, 50), (7, 3), (20, 17, 3, 3), (6, 40, 5)])
    def test_masks_have_exactly_the_zeros_that_are_stated_and_hold(self, name: str, shape: tuple[int, ...]):
        pattern = Pattern.parse(name)
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
        for level in (0.3, 0.5, 0.9):
            zeros = pattern.zeros(shape, level)
            mask = pattern.mask(weight, zeros)
            assert mask.shape == shape
            assert int(mask.sum()) == zeros
            assert pattern.holds(weight.masked_fill(mask, 0))

    def test_two_of_four_neighbouring_inputs_stay_at_every_position_of_a_kernel(self):
        weight = torch.randn(3, 10, 2, 2, generator=torch.Generator().manual_seed(0))
        mask = Pattern.parse("2:4").mask(weight.abs(), 0)
        for o, i, y, x in np.ndindex(3, 2, 2, 2):
            group = weight[o, 4 * i : 4 * i + 4, y, x].abs().tolist()
            gone = mask[o, 4 * i : 4 * i + 4, y, x].tolist()
            assert [value for value, zero in zip(group, gone, strict=True) if zero] == [
                value for value in group if value in sorted(group)[:2]
            ]
        assert not mask[:, 8:].any()

    def test_the_blocks_of_least_energy_go(self):
        weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
        mask = Pattern.parse("4x4").mask(weight.square(), 32)
        energies = {(i, j): weight[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].square().sum() for i, j in np.ndindex(2, 3)}
        least = sorted(energies, key=lambda place: energies[place])[:2]
        for i, j in energies:
            part = mask[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert part.all() if (i, j) in least else not part.any()

    def test_a_broken_pattern_is_seen(self):
        weight = torch.ones(4, 8)
        weight[:, ::4] = 0
        assert not Pattern.parse("2:4").holds(weight)
        assert not Pattern.parse("1x8").holds(weight)
        assert Pattern.parse("unstructured").holds(weight)


class TestScores:
    def test_they_are_those_of_the_papers(self):
        weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        energies = inputs.square().mean(0)
        w, norms = weight.numpy(), np.linalg.norm(inputs.numpy(), axis=0)
        for i, j in np.ndindex(4, 6):
            size = abs(w[i, j])
            assert magnitude(weight)[i, j] == size**2
            assert wanda(weight, energies)[i, j].item() == pytest.approx((size * norms[j]) ** 2 / 50, rel=1e-12)
            relative = size / np.abs(w[i]).sum() + size / np.abs(w[:, j]).sum()
            expected = (relative * norms[j] ** 0.5) ** 2 / 50**0.5
            assert ria(weight, energies)[i, j].item() == pytest.approx(expected, rel=1e-12)
            at_least = sum(value**2 for value in w.ravel() if abs(value) >= size)
            assert lamp(weight)[i, j].item() == pytest.approx(size**2 / at_least, rel=1e-12)

    def test_wanda_compares_within_outputs(self):
        layer = make_layer()
        gone = SCORED["wanda"](layer, Pattern(), 9 * 12)
        scores = layer.weight.abs().numpy() * np.sqrt(np.diag(layer.products.numpy()))
        for row, mask in zip(scores, gone.numpy(), strict=True):
            assert set(np.flatnonzero(mask)) == set(np.argsort(row)[:12])

    def test_the_rest_of_a_number_that_rows_do_not_divide_goes_to_the_first_ones(self):
        assert SCORED["wanda"](make_layer(), Pattern(), 100).sum(1).tolist() == [12] + [11] * 8


def surgeon_of_reference(layer: Layer, pattern: Pattern, zeros: int, span: int) -> np.ndarray:
    """Optimal brain surgeon by elimination from the explicit inverse, one column after the other."""
    weight = layer.weight.double().numpy().copy()
    inverse = np.linalg.inv(damped(layer))
    diagonals = []
    left = inverse.copy()
    for i in range(len(left)):  # what the diagonal will be once the columns before are gone
        diagonals.append(left[i, i])
        left = left - np.outer(left[:, i], left[i]) / left[i, i]
    gone = np.zeros(weight.shape, dtype=bool)
    starts = dict(spans_of(layer, pattern, span))
    whole = sum((end - start) // pattern.columns for start, end in starts.items())
    seen = done = 0
    for i in range(weight.shape[1]):
        worth = weight**2 / np.array(diagonals)
        if not pattern.stay and i in starts:
            end = starts[i]
            seen += (end - i) // pattern.columns
            rows = len(weight) // pattern.rows
            now = (zeros // pattern.each) * seen // whole
            cells = {
                (r, c): worth[
                    r * pattern.rows : (r + 1) * pattern.rows,
                    i + c * pattern.columns : i + (c + 1) * pattern.columns,
                ].sum()
                for r in range(rows)
                for c in range((end - i) // pattern.columns)
            }
            for r, c in sorted(cells, key=lambda place: cells[place])[: now - done]:
                gone[
                    r * pattern.rows : (r + 1) * pattern.rows,
                    i + c * pattern.columns : i + (c + 1) * pattern.columns,
                ] = True
            done = now
        offset = i % layer.run
        if pattern.stay and offset % pattern.columns == 0 and offset + pattern.columns <= layer.run:
            for row in range(len(weight)):
                least = np.argsort(worth[row, i : i + pattern.columns])[: pattern.each]
                gone[row, i + least] = True
        for row in np.flatnonzero(gone[:, i]):
            change = -weight[row, i] / inverse[i, i] * inverse[i]
            change[:i] = 0
            weight[row] += change
            weight[row, i] = 0
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return weight


class TestSparseGPT:
    @pytest.mark.parametrize(
        ("name", "run", "zeros"),
        [
            ("unstructured", 24, 120),
            ("unstructured", 6, 151),
            ("2:4", 24, 0),
            ("2:4", 6, 0),
            ("1x8", 24, 64),
            ("4x4", 12, 96),
            ("4x4", 6, 48),
        ],
    )
    def test_its_update_equals_elimination_from_the_inverse(self, name: str, run: int, zeros: int):
        layer, pattern = make_layer(run=run), Pattern.parse(name)
        expected = surgeon_of_reference(layer, pattern, zeros, span=8)
        plain = layer.weight.masked_fill(torch.from_numpy(expected == 0), 0)
        made = sparse_gpt(layer, pattern, zeros, span=8)
        found = layer.better(torch.from_numpy(expected), plain)
        torch.testing.assert_close(made, found, rtol=1e-8, atol=1e-10)
        if name == "unstructured":
            assert int((made == 0).sum()) == zeros

    def test_in_float32_it_is_near_that_in_float64(self):
        exact, single = make_layer(), make_layer(dtype=torch.float32)
        a, b = (sparse_gpt(layer, Pattern(), 108).double() for layer in (exact, single))
        assert (a == 0).equal(b == 0)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

    def test_one_factorisation_serves_all_levels(self, monkeypatch: pytest.MonkeyPatch):
        layer = make_layer()
        calls = []
        cholesky = torch.linalg.cholesky
        monkeypatch.setattr(torch.linalg, "cholesky", lambda *a, **k: calls.append(1) or cholesky(*a, **k))
        for zeros in (50, 100, 150):
            sparse_gpt(layer, Pattern(), zeros)
        assert len(calls) == 2  # of the moments, and of their inverse


def least_squares_on(layer: Layer, gone: Tensor) -> np.ndarray:
    """Constrained least squares, one row at a time, in float64."""
    moments, weight = damped(layer), layer.weight.double().numpy()
    found = np.zeros_like(weight)
    for row, mask in enumerate(gone.numpy()):
        stay = np.flatnonzero(~mask)
        found[row, stay] = np.linalg.solve(moments[np.ix_(stay, stay)], moments[stay] @ weight[row])
    return found


class TestUpdateOnTheSupport:
    @pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
    def test_it_becomes_constrained_least_squares(self, share: float):
        layer = make_layer()
        gone = SCORED["wanda"](layer, Pattern(), round(share * layer.weight.numel()))
        found = fit_on_support(layer, gone, steps=5000)
        best = torch.from_numpy(least_squares_on(layer, gone))
        torch.testing.assert_close(layer.row_errors(found), layer.row_errors(best), rtol=1e-2, atol=1e-9)
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)
        assert not found[gone].any()

    def test_twenty_steps_take_most_of_what_least_squares_gain(self):
        layer = make_layer(16, 48)
        gone = SCORED["magnitude"](layer, Pattern(), 16 * 24)
        plain, best = layer.weight.masked_fill(gone, 0), torch.from_numpy(least_squares_on(layer, gone))
        errors = [layer.row_errors(each).sum().item() for each in (plain, fit_on_support(layer, gone), best)]
        assert errors[2] <= errors[1] < errors[2] + 0.3 * (errors[0] - errors[2])


class TestAllMethods:
    @pytest.mark.parametrize("name", PATTERNS)
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("run", [48, 12])
    def test_they_hold_the_pattern_and_never_add_to_the_error_of_their_mask(self, method, name: str, run: int):
        layer, pattern = make_layer(33, 48, run, torch.float32), Pattern.parse(name)
        shape = (33, run) if run == 48 else (33, run, 4)
        zeros = pattern.zeros(shape, 0.5)
        made = solve(layer, method, pattern, zeros)
        weight = weight_of_matrix(made, shape)
        assert int((made == 0).sum()) == zeros
        assert pattern.holds(weight)
        masked = layer.weight.masked_fill(made == 0, 0)
        assert (layer.row_errors(made) <= layer.row_errors(masked)).all()
        torch.testing.assert_close(matrix_of_weight(weight), made)

    def test_each_update_of_a_mask_has_less_error(self):
        layer = make_layer(32, 64)
        made = [solve(layer, method, Pattern(), 1024) for method in ("sparsegpt", "admm")]
        surgeon, fitted = (layer.row_errors(each).sum().item() for each in made)
        masked = layer.weight.masked_fill(made[0] == 0, 0)
        assert fitted < surgeon < layer.row_errors(masked).sum().item()

    def test_error_is_that_of_the_outputs(self):
        inputs = torch.randn(200, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        conv = nn.Linear(12, 5, bias=False, dtype=torch.float64)
        weight = conv.weight.detach()
        layer = Layer(weight, inputs.T @ inputs / 200, 12)
        other = solve(layer, "sparsegpt", Pattern(), 30)
        expected = ((inputs @ other.T) - (inputs @ weight.T)).square().mean(0)
        torch.testing.assert_close(layer.row_errors(other), expected)
        assert not layer.row_errors(weight).any()
