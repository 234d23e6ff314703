"""The analyses on a real model and real data, where both are there: SmolLM2-135M on TREC."""

import os
from pathlib import Path

import numpy as np
import pytest

from jaxlab.icl import Compression, TRECConfig
from jaxlab.tasks import execute
from jaxlab.tasks import icl as task

MODEL = Path(os.environ.get("JAXLAB_MODELS", "~/models")).expanduser() / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = Path(os.environ.get("JAXLAB_DATA", "../shared/data")) / "trec"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason=f"needs {MODEL}; set JAXLAB_MODELS to its folder")
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets; set JAXLAB_DATA")
def test_smollm2_on_trec(tmp_path):
    """Attention of deep layers predicts the answer, and the anchors keep more than random words do."""
    config = task.Config(
        model=str(MODEL),
        data=TRECConfig(path=str(DATA)),
        analyses=("attention", "compression"),
        examples=8,
        batch_size=8,
        seeds=(42,),
        compression=Compression(random_sets=3, repeats=1),
    )
    results = execute("icl", config, outputs=tmp_path).results
    assert results["dequantized"]
    aucroc = np.asarray(results["attention"]["aucroc"])
    assert aucroc[20:].mean() > aucroc[:10].mean()
    rows = {row["method"]: row for row in results["compression"]["table"]}
    assert rows["hidden_anchor"]["word_loyalty"] > rows["hidden_random"]["word_loyalty"]
