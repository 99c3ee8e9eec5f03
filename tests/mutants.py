"""Which plausible bugs would the tests notice? Puts one after another into a copy of the repository.

    python tests/mutants.py > tests/mutants.md    # all, 8 minutes
    python tests/mutants.py λ 4                   # those with all of these words in their description

No part of the tests, nor of CI: for when the code, or the tests, have been turned over.
"""

import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = [  # (what goes wrong, what stands once in the program, what does instead, tests to run)
    ("text direction reversed", "text_target - text_source, dim=-1, eps", "text_source - text_target, dim=-1, eps", "losses"),
    ("angles with oneself count", "max(len(z) * (len(z) - 1), 1)", "len(z) ** 2", "losses"),
    ("noisy text not normalised", "return F.normalize(text + sigma * noise, dim=-1)", "return text + sigma * noise", "losses"),
    ("contrast one way only", "return (image_to_text + text_to_image) / 2", "return image_to_text", "losses"),
    ("same ε for both texts", "t_s = stochastic_text(text_source, recipe.sigma, generator)", "start = generator.get_state(); t_s = stochastic_text(text_source, recipe.sigma, generator); generator.set_state(start)", "mapper"),
    ("σ for the target's text alone", "stochastic_text(text_source, recipe.sigma,", "stochastic_text(text_source, 0,", "mapper"),
    ("σ ignored in training", "    # ε is drawn", "    recipe = type(recipe)(pair=recipe.pair, form=recipe.form, cls=recipe.cls, sigma=0)\n    #", "mapper"),
    ("λ_pair ignored", "recipe.pair * pairwise", "pairwise", "mapper"),
    ("λ_cls ignored", "recipe.cls * class", "class", "mapper"),
    ("L_cls reads z", "* class_consistency(z_hat,", "* class_consistency(z,", "mapper"),
    ("unit ignored", "z_hat if recipe.unit else output", "z_hat", "mapper -k first_steps"),
    ("mapper's weight decay 0", "lr=3e-3, weight_decay=0.05", "lr=3e-3, weight_decay=0.0", "mapper"),
    ("LADS keeps the last epoch", "if loss < best[k][0]:", "if True:", "mapper"),
    ("LADS's best epoch is that of all targets", "if loss < best[k][0]:", "if loss < best[0][0]:", "mapper"),
    ("ε of its own for each target", 'randomness="same"', 'randomness="different"', "mapper"),
    ("text direction of the first target for all", "return loss(m, text_target)", "return loss(m, text_targets[0])", "mapper"),
    ("each mapper on a core that all share", "torch.set_num_threads(threads // workers)", "pass", "mapper -k side"),
    ("the end token is cropped off", "differ.max().item() + 2", "differ.max().item() + 1", "data -k padding"),
    ("texts of towers that look back are cropped", 'pool in ("argmax", "eos")', "True", "data -k padding"),
    ("easy patches count", "losses > tau, losses, 0", "losses > tau, losses, losses", "clipstyler"),
    ("styled features in another order", "[row[location] for location, _ in items]]\n\n\nclass R", "[*range(len(items))]]\n\n\nclass R", "clipstyler"),
    ("styled features left out", "return self.z_hat", "return z", "clipstyler"),
    ("captions in sorted order", '[rows[path]["caption"] for path in paths]', '[rows[path]["caption"] for path in sorted(paths)]', "data"),
    ("cache key without time of change", ", stat(at.file).st_mtime_ns", "", "data"),
    ("split without seed", "{self.name} {seed} {name}", "{self.name} {name}", "data"),
    ("validation images trained on", '"train" if i < train', '"train" if i < val', "data"),
    ("augmentation and preprocessing exchanged", "model, augment, preprocess = open_clip.create_model_and_transforms(\n            place", "model, preprocess, augment = open_clip.create_model_and_transforms(\n            place", "data"),
    ("test images stay in the pool", "if cosine >= same:", "if False:", "anchors"),
    ("the farthest pairs are found", "descending=True", "descending=False", "anchors"),
    ("ids of a shard as the pool's", "rows + start], 1)", "rows], 1)", "anchors -k faiss"),
    ("a caption stays when its image changes", 'in (None, os.path.getsize(location.file))', "is not 0", "anchors -k changes"),
    ("pairs of all images for each seed", "in pairs if mine & {*pair[2]}", "in pairs", "anchors"),
    ("exchanged shards pass", "if hashlib.sha256(content).hexdigest() != sha:", "if False:", "anchors"),
    ("changed bytes pass", "if member := file.testzip():", "if member := None:", "files"),
    ("captions stay locked", "    utils.unlock(lock)  #", "    #", "anchors -k resume"),
    ("what changed back is not measured", "rows = results.latest(config.run).values()", "rows = results.rows(config.run)", "evaluate"),
    ("caption by position in the batch", "[captions[row] for row in rows.tolist()]", "[captions[i] for i in range(len(rows))]", "finetune"),
    ("one template for all", "tokens[template[rows], labels[rows]]", "tokens[0, labels[rows]]", "finetune"),
    ("augmentation off", "numbered, clip.augment", "numbered, clip.preprocess", "finetune"),
    ("pairs begin anew each epoch", "range(epoch * steps, (epoch + 1) * steps)", "range(steps)", "finetune"),
    ("original features alone", "for x in features)", "for x in features[:1])", "finetune"),
    ("λ_ret ignored", "lambda_ret * l_con(", "l_con(", "finetune"),
    ("--lambda-cap ignored", "= self.config.lambda_cap, self.config", "= 1.0, self.config", "finetune"),
    ("mappers of seed 0", "method.recipe, domain, seed, items", "method.recipe, domain, 0, items", "finetune"),
    ("head starts without s", "(clip, clip.logit_scale * start,", "(clip, start,", "finetune"),
    ("LP-FT starts from text", "start = probe.head.weight.data", "pass", "finetune"),
    ("MaPLe's prompts in one layer alone", "zip(modules, vectors):", "zip(modules, vectors[:1]):", "finetune -k maple"),
    ("MaPLe's last prompts in all layers", "args, context=context: put", "args: put", "finetune -k maple"),
    ("MaPLe's hooks stay", "hooks.enter_context(module", "(module", "finetune -k maple"),
    ("MaPLe's images without prompts", "            with self.prompted():\n                return", "            if True:\n                return", "finetune -k maple"),
    ("images tested without MaPLe's prompts", "with prompted:", "with contextlib.nullcontext():", "evaluate -k maple"),
    ("logit scale not clamped", "self.towers.logit_scale.data.clamp_(max=math.log(100))", "pass", "finetune"),
    ("weight decay 0", "schedule.lr, weight_decay=weight_decay", "schedule.lr, weight_decay=0.0", "finetune"),
    ("no warm-up", "if step < warm:", "if False:", "finetune"),
    ("gradients not cut", "if schedule.max_norm:", "if False:", "finetune"),
    ("optimizer not resumed", 'optimizer.load_state_dict(state["optimizer"])', "pass", "finetune -k resumes"),
    ("gradients summed over processes", "p.grad /= ranks()[1]", "pass", "finetune -k processes"),
    ("contrast within a process", "image, text = gathered(image, n), gathered(text, n)", "pass", "finetune -k processes"),
    ("rows of processes one after another", "torch.stack(all_gather(x), dim=1).flatten(0, 1)", "torch.cat(all_gather(x))", "finetune -k processes"),
    ("odd image left out", "-(-n // world) * world, world)]", "n // world * world, world)]", "finetune -k processes"),
    ("augmentation by process", "short_hash(self.draw, i)", "short_hash(self.draw, i, os.environ.get('RANK'))", "finetune -k processes"),
    ("augmentation the same in each epoch", '"images", seed, epoch)', '"images", seed, 0)', "finetune -k augmentation"),
    ("a week's wait for a stalled process", "timeout=STALLED", "timeout=timedelta(days=7)", "finetune -k stalled"),
    ("--micro-batch ignored", "n = self.micro_batch or len(x)", "n = len(x)", "finetune -k micro"),
    ("extended is the mean of all", '(value_of[source, "test"] + ood) / 2', "statistics.mean(value_of.values())", "evaluate"),
    ("head in the target's words", "return lambda domain: head_of(", 'return lambda domain: (zero_shot_head(clip, *data.prompt_templates(dataset, domain)), None) if trained is None else head_of(', "evaluate"),
    ("unseen classes by the seen head", "heads(clip, unseen, config.source", "heads(clip, dataset, config.source", "evaluate"),
    ("α reversed", "(1 - alpha) * original[k] + alpha * v", "alpha * original[k] + (1 - alpha) * v", "evaluate"),
    ("checkpoint of another model", 'state["fingerprint"] == clip.fingerprint', "True", "evaluate"),
    ("figure 4: domain consistency reversed", "both < len(target[0])", "both >= len(target[0])", "evaluate"),
    ("figure 4: target and source exchanged", "real[domain], real[source])", "real[source], real[domain])", "evaluate"),
    ("deviation of a population", "statistics.stdev(values)", "statistics.pstdev(values)", "report"),
]  # fmt: skip


def run_tests(folder, words):
    """The tests' exit status (0: they notice nothing), in a process of its own."""
    sys.dont_write_bytecode = True  # its key, time and length, is too coarse for us
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(folder)
    file, *more = shlex.split(words)
    sys.exit(pytest.main(["-qx", "-p", "no:cacheprovider", f"tests/test_{file}.py", *more]))


def main():
    files = [f for f in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if f.parent != ROOT / "tests"]
    program = {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}
    places = {old: [f for f in program for _ in range(program[f].count(old))] for _, old, *_ in MUTANTS}
    if strange := [f"{old!r}: {len(place)} times" for old, place in places.items() if len(place) != 1]:
        sys.exit("to stand once in the program, but:\n" + "\n".join(strange))
    context, survivors = multiprocessing.get_context("forkserver"), 0
    context.set_forkserver_preload(["torch._dynamo", "open_clip", "transformers", "pandas", "pytest"])
    ignored = shutil.ignore_patterns(".*", "data", "runs", "results", "__pycache__")
    print("| what goes wrong | in | tests | |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(ROOT, Path(scratch, "copy"), ignore=ignored)
        for name, old, new, tests in MUTANTS:
            if not all(word in name for word in sys.argv[1:]):
                continue
            [file] = places[old]
            (copy / file).write_text(program[file].replace(old, new), encoding="utf-8")
            process = context.Process(target=run_tests, args=(copy, tests))
            process.start()
            process.join()
            (copy / file).write_text(program[file], encoding="utf-8")
            verdict = {0: "SURVIVES", 1: "noticed"}.get(process.exitcode, "tests did not run")
            survivors += verdict != "noticed"
            print(f"| {name} | {file} | tests/test_{tests.split()[0]}.py | {verdict} |", flush=True)
    sys.exit(min(survivors, 1))


if __name__ == "__main__":
    main()
