"""Where batches come from: pure functions of (seed, step), so that a resumed run reads the same ones."""
