"""Training steps of a Llama in PyTorch, by transformers and AdamW; for train.py, by a Python that has both.

    torch/bin/python benchmarks/train_torch.py '{"width": 256, "layers": 6}'

It makes a step for every line that it reads, and answers with a line of JSON: wall and processor seconds, and
the loss. Imports nothing of this project.
"""

import json
import resource
import sys
import time


def main(sizes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(sizes["threads"])
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp_width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        max_position_embeddings=sizes["length"],
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    shape = (sizes["rows"], sizes["length"])
    tokens = torch.randint(sizes["vocabulary"], shape, generator=torch.Generator().manual_seed(0))

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}))
    sys.stdout.flush()
    for _ in sys.stdin:
        clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        loss = step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps({"wall": time.perf_counter() - clock, "cpu": cpu, "loss": loss}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
