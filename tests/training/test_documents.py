"""Training on documents, from the command line: prepared once, killed and resumed to the bit, retrofitted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.app.runs import Run
from jaxlab.checkpoints import load_model
from jaxlab.config import load
from jaxlab.data import make_source
from jaxlab.losses import target_losses
from jaxlab.tasks import main, train
from tests.models.tiny import make_params, run_model

MODEL = "width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_width: 16, max_length: 32"
NSA = "kind: nsa, block_len: 4, stride: 2, block_size: 4, num_blocks: 3, window: 8, compress_width: 16"
PROGRAM = """
import os, signal, sys
from pathlib import Path
from jaxlab.config import load
from jaxlab.app.runs import Run
from jaxlab.tasks import train

class Killed(Run):
    def log(self, *, step=None, **metrics):
        super().log(step=step, **metrics)
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

train.run(load(train.Config, sys.argv[1]), Killed(Path(sys.argv[2]), "killed"))
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXLAB_DATA_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        rows = [{"text": f"{name}{i} is {i * i}, " * (i % 7 + 1)} for i in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "config.yaml"
    path.write_text(f"""
model: {{{MODEL}, attention: {{{NSA}}}}}
data:
  kind: documents
  sources:
    - {{path: {tmp_path / "a.jsonl"}, weight: 3}}
    - {{path: {tmp_path / "b.jsonl"}, weight: 1}}
  sequence_length: 32
  held_out: 0.3
mesh: {{data: 1}}
steps: 7
batch_size: 4
log_every: 1
eval_every: 4
eval_batches: 1
checkpoint_every: 2
""")
    return path


def test_prepare_from_the_command_line(config, tmp_path, capsys):
    words = ["prepare", str(config), "--outputs", str(tmp_path / "out")]
    assert main([*words, "--check"]) == 0
    assert "prepared: false" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"tokens are kept in {tmp_path / 'cache'} (JAXLAB_DATA_CACHE sets it)" in out
    [folder] = (tmp_path / "out" / "prepare").iterdir()
    results = json.loads((folder / "results.json").read_text())
    splits = results["splits"]
    assert sum(splits[split]["a.jsonl"]["documents"] for split in splits) == 150
    assert results["tokens"] == sum(one["tokens"] for one in splits["train"].values())
    assert 0.9 < results["fill"] <= 1
    assert results["passed_by"]["b.jsonl"]["rows"] == 150
    assert main([*words, "--check"]) == 0
    assert "prepared: true" in capsys.readouterr().out
    # What a finished run has made may be removed: then it is made again.
    shutil.rmtree(tmp_path / "cache")
    assert main(words) == 0
    assert "tokens are kept in" in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["splits"] == splits


def test_what_prepare_and_train_refuse(config, tmp_path, capsys):
    for words, message in (
        (["--data.kind", "text"], "data.kind: text is read as it is"),
        (["--data.sources", "[{path: nothing.jsonl}]"], "no such file or folder"),
        (["--data.sources", "[]"], "data.sources: which data?"),
        (["--data.sources", "[{path: x, wieght: 1}]"], "did you mean weight?"),
    ):
        assert main(["prepare", str(config), *words]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert main(["prepare", str(config), "--data.held_out", "0.999", "--outputs", str(tmp_path / "o")]) == 2
    assert "a.jsonl: 0 rows of 32 tokens to train on; give more data, or" in capsys.readouterr().err
    assert main(["train", str(config), "--model.vocab_size", "60", "--outputs", str(tmp_path / "o")]) == 2
    assert "the model's vocab_size is 60" in capsys.readouterr().err
    assert main(["train", str(config), "--batch_size", "400", "--outputs", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert (
        "split of the data holds no full batch of 400; lower batch_size, raise data.held_out, which is"
        in said
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_and_resumed_to_the_bit(config, tmp_path, capsys):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, config, tmp_path / "killed"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr
    loaded = load(train.Config, config)
    train.run(loaded, Run(tmp_path / "killed", "killed"))
    assert "resuming at step 4 of 7" in capsys.readouterr().out
    train.run(loaded, Run(tmp_path / "whole", "whole"))
    (_, resumed, _), (_, whole, _) = (load_model(tmp_path / n / "model") for n in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    losses = lambda name: [
        (r["step"], r.get("loss"), r.get("eval_loss"))
        for r in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    ]
    assert losses("killed") == losses("whole")


@pytest.mark.slow
def test_a_dense_model_is_retrofitted_on_documents(config, tmp_path):
    loaded = load(train.Config, config, ["--model.attention", "full", "--steps", "2"])
    (tmp_path / "dense").mkdir()
    train.run(loaded, Run(tmp_path / "dense", "dense"))
    sparse = load(train.Config, config, ["--init_from", str(tmp_path / "dense" / "model"), "--steps", "2"])
    (tmp_path / "sparse").mkdir()
    found = train.run(sparse, Run(tmp_path / "sparse", "sparse"))["retrofit"]
    assert abs(found["loss"]["dense"] - found["loss"]["retrofitted"]) < 0.2
    assert found["loss"]["trained"] > 0


@pytest.mark.slow
def test_a_packed_document_is_what_it_is_alone(config):
    """The losses of NSA on packed rows are those of their documents, one a row."""
    loaded = load(train.Config, config, ["--model.compute_dtype", "float32"])
    batch = make_source(loaded.data).batch(0, 0, 6)
    assert batch["segment_ids"].max() > 1
    alone = {"tokens": [], "segment_ids": [], "loss_mask": []}
    for row in range(6):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == number
            for name, values in (("tokens", batch["tokens"][row]), ("segment_ids", inside)):
                alone[name].append(np.pad(values[inside], (0, 32 - inside.sum())).astype(np.int32))
            alone["loss_mask"].append(np.pad(batch["loss_mask"][row][inside], (0, 32 - inside.sum())))
    params = make_params(loaded.model, jax.random.key(0))
    losses = []
    for rows in (batch, {name: np.stack(values) for name, values in alone.items()}):
        rows = jax.tree.map(jnp.asarray, rows)
        of_tokens, mask = target_losses(run_model(params, rows, loaded.model)[0], rows)
        losses.append(np.sort(np.asarray(of_tokens)[np.asarray(mask)]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-5)
