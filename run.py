"""Run all stages of a paper in one process; run_ldfs.sh and run_arf.sh call it.

    python run.py pacs photo                    # LDFS
    python run.py imagenet --paper arf          # ARF

Each stage stores its outcome under a name that contains a hash of its inputs, and loads what is
stored: a killed run goes on, and a finished one prints its tables again.
"""

from core.config import parse


def main():
    args = parse(__doc__)

    import anchors  # after the flags are checked, because importing PyTorch takes seconds
    import evaluate
    import finetune
    import mapper
    from core.distributed import require_one_process
    from features import load_clip
    from sets.load import load_run

    require_one_process("run.py")
    settings, dataset = load_run(args)
    if any(method.needs_captions for method in settings.methods.values()):
        anchors.caption_source(settings, dataset)            # captions.jsonl beside the images
        print(anchors.caption_summary(settings, dataset))
    clip = load_clip(settings)
    print(mapper.describe_run(settings, dataset, clip.device))
    if any(method.needs_pairs for method in settings.methods.values()):
        anchors.retrieve_pairs(settings, dataset, clip)      # runs/…/pairs/
    evaluate.encode_test_images(settings, dataset, clip)     # an unreadable one is named early
    mapper.train_all(settings, dataset, clip)                # LDFS, step 1: runs/…/mappers/
    finetune.finetune_all(settings, dataset, clip)           # LDFS, step 2, or ARF: checkpoints/
    records = evaluate.evaluate(settings, dataset, clip)     # runs/…/scores/
    evaluate.report(settings, dataset, clip, records)        # table.md and figures


if __name__ == "__main__":
    main()
