"""Flows of a model in bfloat16 by PyTorch's eager attention, for icl_bf16.py. Imports nothing from here.

torch/bin/python benchmarks/icl_bf16_torch.py FOLDER inputs.npz outputs.npy
"""

import sys

import numpy as np


def main(model, inputs, outputs):
    import torch
    import transformers

    given = np.load(inputs)
    tokens, words = (torch.from_numpy(given[name].astype(np.int64)) for name in ("tokens", "words"))
    hot = np.eye(3)[given["classes"]] * (given["classes"] >= 0)[..., None]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="eager"
    )
    model.eval().requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that there is a graph at all
    found = []
    for row, classes in zip(tokens, hot, strict=True):
        out = model(row[None], use_cache=False, output_attentions=True, logits_to_keep=1)
        loss = -torch.log_softmax(out.logits[:, -1, words].float(), -1)[0, 1]
        gradients = torch.autograd.grad(loss, out.attentions)
        pairs = zip(out.attentions, gradients, strict=True)
        flow = np.array([(a.float() * g.float()).sum(1)[0].detach().numpy() for a, g in pairs], np.float64)
        found.append(np.einsum("lij,ix,jy->lxy", np.tril(np.abs(flow), -1), classes, classes))
    np.save(outputs, np.array(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
