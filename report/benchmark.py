"""How fast, in how much memory: a step of CE, FLYP, ARF; BLIP-2's captions. Random weights, pixels.

    python -m report.benchmark                                    # ViT-B/16, batch 512; on a GPU
    python -m report.benchmark --batch-size 8 --steps 1 finetune  # on a laptop

Prints a row of a table for each, with the device's name. No image is read or decoded.
"""

import open_clip
import torch
from torch.utils.benchmark import Timer

from batches import Batch
from config import DEFAULT_MODEL, Parser, number
from distributed import the_device
from features import Clip, precision
from finetune import ce_step, contrastive_step


def finetuning(method, name, batch_size, device, classes=1000):
    """A step with AdamW of "finetune" (image tower and head), "flyp" or "arf" (both towers)."""
    model = open_clip.create_model(name, device=device)
    clip = Clip(model, None, None, None, device, name)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    images, more = torch.randn(2, batch_size, 3, size, size, device=device)
    labels = torch.randint(classes, (batch_size,), device=device)
    tokens = torch.randint(1, 40000, (3, batch_size, model.context_length), device=device)
    batch = Batch(labels, images=images, prompts=tokens[0])
    if method == "arf":
        batch.captions, batch.retrieved = tokens[1], (more, tokens[2], batch_size)
    head = torch.nn.Linear(model.text_projection.shape[1], classes, device=device)
    trained = torch.nn.ModuleList([head, model.visual] if method == "finetune" else [model])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5, fused=True)

    def step():
        if method == "finetune":
            loss = ce_step([clip.encode_image(images)], labels, head)
        else:
            loss = contrastive_step(clip, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def captioning(batch_size, device, beams=5, length=30):
    """Captions, all of one length, by a model of the shape of Salesforce/blip2-opt-2.7b."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    opt = {
        "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "word_embed_proj_dim": 2560, "vocab_size": 50304,
    }
    config = Blip2Config(text_config=opt, image_token_index=50265)
    with device:
        model = Blip2ForConditionalGeneration._from_config(config, dtype=precision(device)).eval()
    pixels = torch.randn(batch_size, 3, 224, 224, device=device, dtype=precision(device))
    tokens = torch.full((batch_size, config.num_query_tokens + 1), 50265, device=device)
    tokens[:, -1] = 2  # the image's 32 tokens and the start of the text
    return lambda: model.generate(
        pixel_values=pixels, input_ids=tokens, attention_mask=torch.ones_like(tokens),
        num_beams=beams, min_new_tokens=length, max_new_tokens=length, do_sample=False,
    )


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    known = ["finetune", "flyp", "arf", "captions"]
    parser.add_argument("what", nargs="*", default="all", choices=["all", *known])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="open_clip's name of one")
    for flag, default in (("--batch-size", 512), ("--caption-batch", 32), ("--steps", 10)):
        parser.add_argument(flag, type=number(int, 0), default=default)
    args, device, memory = parser.parse_args(), the_device(), ""
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads"
    for what in known if "all" in args.what else args.what:
        if what == "captions":
            name, n = "BLIP-2-opt-2.7b", args.caption_batch
            step = captioning(n, device)
        else:
            name, n = args.model, args.batch_size
            step = finetuning(what, name, n, device)
        # it warms up, and waits for the GPU
        timer = Timer("step()", globals={"step": step}, num_threads=threads)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        speed = n / timer.timeit(args.steps).mean
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        print(f"| {what} | {name} | {n} | {speed:.1f} | {memory} | {where} |", flush=True)


if __name__ == "__main__":
    main()
