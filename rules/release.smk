# The data set as it may be passed on: Parquet, card, checksums.


rule write_release:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        responses=flow.pool_responses(),
        scores=flow.results("04_ratings/scores.jsonl"),
        train=flow.results("05_pairs/train.jsonl"),
        dev=flow.results("05_pairs/dev.jsonl"),
        test=flow.results("05_pairs/test.jsonl"),
        taxonomy=config["files"]["taxonomy"],
        template="report/dataset_card.md.jinja",
        ethics="report/ethics.md.jinja",
    output:
        card=flow.results("13_release/README.md"),
        sums=flow.results("13_release/SHA256SUMS"),
        parquet=expand(
            flow.results("13_release/{config}/{split}.parquet"),
            config=["pairs", "trl", "responses"],
            split=["train", "validation", "test"],
        ),
    log:
        flow.logs("write_release.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=pages.write_release,
        code=code("write_release"),
        folder=output_folder,
    message:
        "Write the data set for release"
    shell:
        "python scripts/write_release.py --speeches {input.speeches} --responses {input.responses} --scores {input.scores}"
        " --train {input.train} --dev {input.dev} --test {input.test} --taxonomy {input.taxonomy} --settings {params.settings:q}"
        " --out-dir {params.folder} 2> {log}"
