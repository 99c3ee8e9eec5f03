"""How fast, and in how much memory: a finetuning step of CE, FLYP and ARF, and BLIP-2's captions. Random weights and pixels.

    python benchmark.py                                    # ViT-B/16, batch 512; on a GPU
    python benchmark.py --batch-size 8 --steps 1 finetune  # on a laptop

Prints a row of the README's table for each, with the device's name. It computes alone: no image is read or decoded.
"""

import time

import open_clip
import torch
import torch.nn.functional as F

from data import Parser, positive
from features import autocast, precision, the_device
from finetune import Anchors, arf_loss, step_loss


def measured(step, batch_size, steps, device):
    """(images a second, peak memory in GB or None on a CPU) of `steps` calls of `step`, after one that warms up."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return steps * batch_size / seconds, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def finetuning(name, losses, batch_size, steps, device, classes=1000):
    """One step of finetune.py's loop, with AdamW: "finetune" (image tower and head), "flyp" or "arf" (both towers)."""
    model = open_clip.create_model(name, device=device)
    size, length = open_clip.get_model_config(name)["vision_cfg"]["image_size"], model.context_length
    images, more = torch.randn(2, batch_size, 3, size, size, device=device)
    labels = torch.randint(classes, (batch_size,), device=device)
    tokens = torch.randint(1, 40000, (3, batch_size, length), device=device)  # of prompts, captions, retrieved texts
    head = torch.nn.Linear(model.text_projection.shape[1], classes, bias=False, device=device)
    trained = [head, model.visual] if losses == "finetune" else [model]
    optimizer = torch.optim.AdamW([p for module in trained for p in module.parameters()], lr=1e-5, fused=True)

    def encode(function, x):
        with autocast(device):
            return function(x, normalize=True).float()

    def step():
        z, scale = encode(model.encode_image, images), model.logit_scale.exp()
        if losses == "finetune":
            loss = step_loss([z], labels, F.normalize(head.weight, dim=-1), scale.detach())
        else:
            prompts, captions, retrieved = encode(model.encode_text, tokens[0]), None, None
            if losses == "arf":
                captions = encode(model.encode_text, tokens[1])
                retrieved = encode(model.encode_image, more), encode(model.encode_text, tokens[2])
            loss = arf_loss([z], prompts, captions, retrieved, scale, Anchors())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return measured(step, batch_size, steps, device)


@torch.no_grad()
def captioning(batch_size, steps, device, beams=5, tokens=30):
    """Captions by a model of the shape of Salesforce/blip2-opt-2.7b, all of them `tokens` long."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {"model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = Blip2Config(text_config={**text, "word_embed_proj_dim": 2560, "vocab_size": 50304}, image_token_index=50265)
    with device:
        model = Blip2ForConditionalGeneration._from_config(config, dtype=precision(device)).eval()
    pixels = torch.randn(batch_size, 3, 224, 224, device=device, dtype=precision(device))
    asked = torch.full((batch_size, config.num_query_tokens + 1), 50265, device=device)
    asked[:, -1] = 2  # the image's 32 tokens and the start of the text

    def step():
        model.generate(
            pixel_values=pixels, input_ids=asked, attention_mask=torch.ones_like(asked), num_beams=beams,
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        )

    return measured(step, batch_size, steps, device)


def main():
    parser, known = Parser(description=__doc__.split("\n")[0]), ["finetune", "flyp", "arf", "captions"]
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="open_clip's name of an architecture")
    parser.add_argument("--batch-size", type=positive(int), default=512)
    parser.add_argument("--caption-batch", type=positive(int), default=32)
    parser.add_argument("--steps", type=positive(int), default=10)
    args = parser.parse_args()
    if odd := [what for what in args.what if what not in known]:
        parser.error(f"{odd[0]}: not one of {', '.join(known)}")
    if args.model not in open_clip.list_models():
        parser.error(f"--model {args.model}: open_clip knows no such architecture")
    device = the_device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for what in args.what or known:
        batch_size = args.caption_batch if what == "captions" else args.batch_size
        if what == "captions":
            speed, memory = captioning(batch_size, args.steps, device)
        else:
            speed, memory = finetuning(args.model, what, batch_size, args.steps, device)
        name = "BLIP-2-opt-2.7b" if what == "captions" else args.model
        memory = "" if memory is None else f"{memory:.1f} GB"
        print(f"| {what} | {name} | {batch_size} | {speed:.1f} | {memory} | {where} |", flush=True)


if __name__ == "__main__":
    main()
