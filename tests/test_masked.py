"""Networks with zeros by what layers read: what is built, its database, and searches on it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import FileFormatError
from autoprune.evaluators import Context, Evaluator, Masked
from autoprune.importance.calibration import Calibration
from autoprune.importance.masks.observe import observe_weights
from autoprune.importance.masks.solver import Solver
from autoprune.metrics.scorers import sampled_loss
from autoprune.optimizers import OPTIMIZERS
from autoprune.protocols import OK
from autoprune.search_spaces import Channels, Product, Sparsity
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.zeros import Pattern, zero_masks
from autoprune.testing.contexts import context_of, image_context, sequence_context
from autoprune.testing.contracts import EvaluatorContract
from tests.candidates import outputs_of

PATTERNS = ("unstructured", "2:4", "1x8")


class TestMasked(EvaluatorContract):
    def make_evaluator(self) -> Evaluator:
        return Masked()

    def make_context(self) -> Context:
        return image_context(Sparsity(levels=(0, 0.5, 0.8), patterns=PATTERNS))


class TestMaskedInAProduct(EvaluatorContract):
    def make_evaluator(self) -> Evaluator:
        return Masked("sparsegpt")

    def make_context(self) -> Context:
        return sequence_context(Product(Channels(), Sparsity(levels=(0, 0.5, 0.8))), "agreement")


class Layers(nn.Module):
    """Layers with and without bias, batch norm, a convolution, a weight stored by inputs, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.linear = nn.Linear(8 * 16, 12)
        self.stored = nn.Parameter(torch.randn(12, 16) / 4)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x)).relu())
        return self.head((self.linear(x.flatten(1)).relu() @ self.stored).relu())


@pytest.fixture(scope="module")
def layers() -> Context:
    torch.manual_seed(0)
    model = Layers().eval()
    x = torch.randn(160, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(x).argmax(1)
    return context_of(model, (x, labels), Sparsity(levels=(0, 0.5, 0.8), patterns=PATTERNS), "agreement")


def candidate_of(context: Context, option: float | str) -> np.ndarray:
    """The candidate with this option wherever a weight has it."""
    options = [dimension.options for dimension in context.space.dimensions]
    return np.array([own.index(option) if option in own else 0 for own in options], dtype=np.int64)


def prepared(context: Context, method: str = "admm", **settings: object) -> Masked:
    evaluator = Masked(method, **settings)  # type: ignore[arg-type]  # settings by name
    evaluator.prepare(context)
    return evaluator


def distance(context: Context, module: nn.Module) -> float:
    """Squared difference of outputs to the dense model on the calibration samples."""
    batches = context.subsets.calibration
    with torch.no_grad():
        pairs = [(context.forward(module, batch), context.forward(context.model, batch)) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs))


class TestWhatIsBuilt:
    @pytest.mark.parametrize("option", [0.5, 0.8, "2:4", "1x8 0.5"])
    @pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "admm"])
    def test_it_has_the_zeros_of_the_candidate(self, layers: Context, method: str, option: float | str):
        candidate = candidate_of(layers, option)
        module = prepared(layers, method).build(candidate)
        pruning = layers.space.pruning(candidate.tolist())
        assert pruning.zeroed
        for name, zeros in pruning.zeroed.items():
            weight = module.get_parameter(name)
            assert int((weight == 0).sum()) == zeros, name
            assert Pattern.parse(pruning.patterns.get(name, "unstructured")).holds(weight)

    def test_it_is_nearer_to_the_dense_model_the_more_the_method_knows(self, layers: Context):
        candidate = candidate_of(layers, 0.8)
        plain, scored, surgeon, fitted = (
            distance(layers, prepared(layers, method).build(candidate))
            for method in ("magnitude", "wanda", "sparsegpt", "admm")
        )
        assert fitted < surgeon < scored < plain

    def test_it_shares_nothing_with_the_database(self, layers: Context):
        evaluator = prepared(layers)
        candidate = candidate_of(layers, 0.5)
        module = evaluator.build(candidate)
        (before,) = evaluator.evaluate(candidate[None])
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        (after,) = evaluator.evaluate(candidate[None])
        np.testing.assert_array_equal(before.signal, after.signal)

    def test_masks_of_zeros_are_found_again(self, layers: Context):
        candidate = candidate_of(layers, 0.5)
        module = prepared(layers).build(candidate)
        masks = zero_masks(module)
        zeroed = layers.space.pruning(candidate.tolist()).zeroed
        assert {name: int(mask.sum()) for name, mask in masks.items()} == zeroed

    def test_zeros_lie_among_what_stays_after_units_are_gone(self):
        context = image_context(Product(Channels(step=0.5), Sparsity(levels=(0, 0.5))))
        evaluator = prepared(context, "sparsegpt")
        candidate = context.space.canonical(np.array([1] * len(context.space.sizes))[None])[0]
        module = evaluator.build(candidate)
        pruning = context.space.pruning(candidate.tolist())
        assert pruning.kept
        for name, zeros in pruning.zeroed.items():
            weight = module.get_parameter(name)
            assert weight.numel() // 2 == zeros == int((weight == 0).sum())
        plain = context.structure.build(context.model, pruning).eval()
        assert distance(context, module.eval()) < distance(context, plain)


def test_biases_are_corrected_where_inputs_are_no_units():
    """The first layer reads the input, of large means, and a residual stream that cannot shrink feeds others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    x = 5 + torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(x).argmax(1)
    context = context_of(model, (x, labels), Sparsity(levels=(0, 0.5)), "agreement")
    module = prepared(context).build(np.array([1, 0]))
    (batch,) = (torch.cat([each[0] for each in context.subsets.calibration]),)
    with torch.no_grad():
        change = module[0](batch) - model[0](batch)
    assert change.mean(0).abs().max() < 1e-5
    assert change.square().mean() < 0.5


class TestObservation:
    def test_moments_and_curvatures_are_those_of_a_plain_pass(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
        tokens = torch.randint(0, 9, (4, 7), generator=torch.Generator().manual_seed(1))
        structure = analyse(Example(model, (tokens,)))
        calibration = Calibration(model, structure, [tokens], lambda module, batch: module(batch))
        found = observe_weights(calibration, list(structure.weights), samples=4, memory_bytes=2**20, seed=5)
        assert sorted(found) == ["1.weight", "3.weight"]
        seen: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for name in ("1", "3"):
            layer = model.get_submodule(name)

            def note(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                seen[name] = args[0].detach().reshape(-1, args[0].shape[-1])
                out.register_hook(lambda gradient: gradients.__setitem__(name, gradient.reshape(-1, out.shape[-1])))

            layer.register_forward_hook(note)
        loss, draws = sampled_loss(model(tokens), tokens, torch.Generator().manual_seed(5))
        loss.backward()
        for name in ("1", "3"):
            (own,) = found[f"{name}.weight"]
            assert own.bias == f"{name}.bias"
            centred = seen[name] - seen[name].mean(0)
            torch.testing.assert_close(own.moments.products(True).float(), centred.T @ centred / 28)
            expected = 0.5 * gradients[name].double().square().sum(0) / draws
            torch.testing.assert_close(own.curvature, expected, rtol=1e-4, atol=1e-9)

    def test_weights_that_cannot_be_observed_go_by_magnitude(self, layers: Context):
        evaluator = prepared(layers)
        assert sorted(evaluator.database.tables) == ["conv.weight", "head.weight", "linear.weight", "stored"]
        module = evaluator.build(candidate_of(layers, 0.5))
        weight, dense = module.get_parameter("grouped.weight"), layers.model.get_parameter("grouped.weight")
        assert torch.equal(weight, torch.where(weight == 0, 0.0, dense))
        assert dense[weight == 0].abs().max() <= dense[weight != 0].abs().min()


class TestDatabase:
    def test_errors_are_those_of_layers_on_their_inputs(self, layers: Context):
        database = prepared(layers).database
        table = database.tables["head.weight"]
        taken = []
        handle = layers.model.get_submodule("head").register_forward_pre_hook(lambda _, args: taken.append(args[0]))
        distance(layers, layers.model)
        handle.remove()
        inputs = torch.cat(taken[::2])  # the model runs twice
        dense = layers.model.get_parameter("head.weight").detach()
        for choice, error in zip(table.choices, table.errors, strict=True):
            change = inputs @ (database.weight("head.weight", choice) - dense).T
            assert error == pytest.approx(float(change.square().sum() / (inputs @ dense.T).square().sum()), rel=1e-3)

    @pytest.mark.parametrize("store", ["tables", "weights"])
    def test_in_a_folder_it_is_made_once(self, layers: Context, tmp_path, monkeypatch: pytest.MonkeyPatch, store: str):
        first = prepared(layers, folder=tmp_path, store=store)
        assert len(list(tmp_path.iterdir())) == 4 + 1  # and the index
        runs: list[str] = []
        monkeypatch.setattr("autoprune.evaluators.masked.observe_weights", lambda *_: runs.append("observed"))
        again = prepared(layers, folder=tmp_path, store=store)
        assert not runs  # the model is not even observed
        candidate = candidate_of(layers, "2:4")
        monkeypatch.undo()
        for module in (again.build(candidate), prepared(layers).build(candidate)):
            state = module.state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in first.build(candidate).state_dict().items())
        other = prepared(layers, "sparsegpt", folder=tmp_path).build(candidate)
        assert not torch.equal(other.head.weight, first.solver().solve("head.weight", Pattern.parse("2:4"), 40))

    def test_tables_take_kilobytes_and_weights_are_stored_when_asked_for(self, layers: Context, tmp_path):
        prepared(layers, folder=tmp_path / "tables")
        asked = prepared(layers, folder=tmp_path / "weights", store="weights")
        few, many = (sum(file.stat().st_size for file in (tmp_path / each).iterdir()) for each in ("tables", "weights"))
        elements = sum(layers.model.get_parameter(name).numel() for name in asked.database.tables)
        assert few < 4 * 2**10
        assert many > 4 * elements * 3
        assert not asked.database.held

    def test_a_folder_of_tables_gets_the_weights_later(
        self, layers: Context, tmp_path, monkeypatch: pytest.MonkeyPatch
    ):
        first = prepared(layers, folder=tmp_path)
        assert not first.database.stored
        asked = prepared(layers, folder=tmp_path, store="weights")
        assert set(asked.database.stored) == set(first.database.tables)
        solved: list[str] = []
        monkeypatch.setattr(Solver, "solve", lambda self, name, *_: solved.append(name))
        candidate = candidate_of(layers, 0.5)
        again = prepared(layers, folder=tmp_path)  # what is there is used
        state = asked.build(candidate).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.build(candidate).state_dict().items())
        assert not solved

    @pytest.mark.parametrize("store", ["tables", "weights"])
    @pytest.mark.parametrize("change", ["errors", "unstructured 20", "more"])
    def test_tensors_of_other_sizes_are_refused_before_they_are_read(
        self, layers: Context, tmp_path, store: str, change: str
    ):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        prepared(layers, folder=tmp_path, store=store)
        file = tmp_path / "head.weight.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({**load_file(file), change: torch.zeros(1)}, file, metadata)
        with pytest.raises(FileFormatError, match=r"head\.weight\.safetensors"):
            prepared(layers, folder=tmp_path, store=store)

    def test_a_damaged_file_is_named(self, layers: Context, tmp_path):
        prepared(layers, folder=tmp_path)
        (tmp_path / "head.weight.safetensors").write_bytes(b"no tensors")
        with pytest.raises(FileFormatError, match=r"head\.weight\.safetensors"):
            prepared(layers, folder=tmp_path)

    def test_an_interrupted_build_goes_on(self, layers: Context, tmp_path, monkeypatch: pytest.MonkeyPatch):
        first = prepared(layers, folder=tmp_path)
        (tmp_path / "zeros.json").unlink()
        (tmp_path / "stored.safetensors").unlink()
        solve, solved = Solver.solve, []
        monkeypatch.setattr(Solver, "solve", lambda self, name, *a: solved.append(name) or solve(self, name, *a))
        again = prepared(layers, folder=tmp_path)
        assert set(solved) == {"stored"}
        for name, table in first.database.tables.items():
            np.testing.assert_array_equal(table.errors, again.database.tables[name].errors)

    def test_a_folder_has_a_limit(self, layers: Context, tmp_path):
        with pytest.raises(ValueError, match=r"store_bytes must be at least \d+, the size of \d+ options, got 1000"):
            prepared(layers, folder=tmp_path, store="weights", store_bytes=1000)

    def test_without_room_weights_are_made_again(self, layers: Context):
        candidate = candidate_of(layers, 0.5)
        few, many = prepared(layers, store_bytes=0), prepared(layers)
        assert not few.database.held
        a, b = (evaluator.build(candidate).state_dict() for evaluator in (few, many))
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())

    def test_its_losses_are_a_prior(self):
        context = sequence_context(Sparsity(levels=(0, 0.5, 0.8)), "agreement")
        prior = prepared(context).expected_losses()
        assert prior is not None
        assert [len(row) for row in prior] == context.space.sizes.tolist()
        for row in prior:
            assert row[0] == 0
            assert (np.diff(row) > 0).all()


@pytest.fixture(scope="module")
def task() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, (x, model(x).argmax(1))


class TestSearch:
    @pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
    def test_every_optimizer_stays_within_budgets_on_zeros(self, task, optimizer: str):
        model, data = task
        result = autoprune.search(
            model,
            ["nonzero_params <= 60%", "stored_bytes <= 80%"],
            data,
            space=Sparsity(levels=(0, 0.3, 0.6, 0.9), patterns=["unstructured", "2:4"]),
            evaluator="masked",
            optimizer=optimizer,
            trials=10,
            execution=autoprune.Execution(progress=False),
        )
        assert [trial for trial in result.trials if trial.status == OK]
        for trial in result.front:
            assert trial.costs["nonzero_params"] <= result.limits["nonzero_params"]
            built = result.build(trial)
            nonzero = sum(int((parameter != 0).sum()) for parameter in built.parameters())
            assert nonzero <= trial.costs["nonzero_params"]

    def test_an_interrupted_search_goes_on(self, task, tmp_path):
        model, data = task

        def run(trials: int, **execution: object) -> autoprune.SearchResult:
            return autoprune.search(
                model,
                "sparse_flops <= 50%",
                data,
                space=Product(Channels(), Sparsity(levels=(0, 0.5), patterns=["unstructured", "1:4"])),
                evaluator=Masked("sparsegpt"),
                optimizer="level_switch",
                trials=trials,
                execution=autoprune.Execution(progress=False, **execution),  # type: ignore[arg-type]  # settings by name
            )

        run(8, run_dir=tmp_path)
        resumed, whole = run(16, run_dir=tmp_path, resume=True), run(16)
        assert [(t.candidate, t.signal) for t in resumed.trials] == [(t.candidate, t.signal) for t in whole.trials]

    def test_what_was_found_is_built_again_from_disk(self, task, tmp_path):
        model, data = task
        space = Sparsity(levels=(0, 0.5, 0.8), patterns=["2:4", "unstructured"])
        execution = autoprune.Execution(progress=False)
        result = autoprune.search(
            model, "nonzero_params <= 55%", data, space=space, evaluator="masked", trials=6, execution=execution
        )
        result.save(tmp_path / "result", weights="best")
        loaded = autoprune.SearchResult.load(tmp_path / "result", model=model)
        assert loaded.space == result.space
        x = (data[0],)
        assert torch.equal(outputs_of(loaded.build().eval(), x)[0], outputs_of(result.build().eval(), x)[0])


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"method": "wandas"}, "method must be one of"),
            ({"bn": 1}, "bn must be"),
            ({"damping": 0}, "damping must be"),
            ({"store_bytes": -1}, "store_bytes must be"),
            ({"store": "masks"}, "store must be one of"),
            ({"store": "weights"}, "store='weights' needs a folder="),
            ({"store": "weights", "folder": "zeros", "sequential": True}, "store='weights' has none for sequential"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, object], message: str):
        with pytest.raises((ValueError, TypeError), match=message):
            Masked(**settings)  # type: ignore[arg-type]  # settings by name
