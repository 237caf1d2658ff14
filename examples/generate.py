"""Keep a transformers model's KV cache in the cold pool: two turns on one context.

    python examples/generate.py [MODEL_DIR]

Starts a private daemon; the default model is the bundled one.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hillinfer
from hillinfer.private_daemon import PrivateDaemon


def main() -> None:
    bundled = Path(hillinfer.__file__).parent / "models" / "needle-8m"
    directory = sys.argv[1] if len(sys.argv) > 1 else str(bundled)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)

    notes = "".join(f"VAR box_{i} := {10000 + i}\n" for i in range(300))
    with (
        PrivateDaemon() as daemon,
        hillinfer.attach(model, socket=daemon.socket, budget=128) as attachment,
        torch.inference_mode(),
    ):
        cache = attachment.new_cache()
        ids = tokenizer(notes, return_tensors="pt").input_ids
        for question in ("print VAR box_17 ->", "print VAR box_290 ->"):
            asked = tokenizer("\n" + question, return_tensors="pt", add_special_tokens=False).input_ids
            ids = torch.cat([ids, asked], dim=1)
            output = model.generate(ids, past_key_values=cache, max_new_tokens=8)
            print(question, tokenizer.decode(output[0, ids.shape[1] :]).split("\n")[0].strip())
            ids = output
        report = attachment.report()
    print(f"KV {report.full_bytes} bytes, resident at most {report.resident_peak_bytes}: {report.resident}")


if __name__ == "__main__":
    main()
