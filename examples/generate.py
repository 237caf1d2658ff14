"""Keep a transformers model's KV cache in the cold pool: several turns on one context.

    python examples/generate.py

Starts a private daemon and asks the bundled model about notes hidden in the standard library's sources.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hillinfer
from hillinfer.demo import make_demo
from hillinfer.model_directory import bundled_model
from hillinfer.private_daemon import PrivateDaemon


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    model = AutoModelForCausalLM.from_pretrained(bundled_model())
    demo = make_demo(tokenizer, context_tokens=4000)

    with (
        PrivateDaemon() as daemon,
        hillinfer.attach(model, socket=daemon.socket, budget="2%") as attachment,
        torch.inference_mode(),
    ):
        cache = attachment.new_cache()
        ids = tokenizer(demo.context, return_tensors="pt").input_ids
        for task in demo.tasks:
            asked = tokenizer("\n" + task.question, return_tensors="pt", add_special_tokens=False).input_ids
            ids = torch.cat([ids, asked], dim=1)
            # `generate` as ever: the cache decides what each step attends to.
            output = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12)
            answer = tokenizer.decode(output[0, ids.shape[1] :]).split("\n")[0].strip()
            print(f"{task.question} {answer}   (right: {task.answer})")
            ids = output
        report = attachment.report()
    print(f"KV {report.full_bytes} bytes, resident at most {report.resident_peak_bytes}: {report.resident}")


if __name__ == "__main__":
    main()
