# Preference pairs of this run (section 3.3).


rule build_pairs:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        responses=flow.pool_responses(),
        scores=flow.results("04_ratings/scores.jsonl"),
    output:
        train=flow.results("05_pairs/train.jsonl"),
        dev=flow.results("05_pairs/dev.jsonl"),
        test=flow.results("05_pairs/test.jsonl"),
    log:
        flow.logs("build_pairs.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.build_pairs,
        code=code("build_pairs"),
    message:
        "Build preference pairs"
    shell:
        "python scripts/build_pairs.py --speeches {input.speeches} --responses {input.responses} --scores {input.scores}"
        " --settings {params.settings:q} --train {output.train} --dev {output.dev} --test {output.test} 2> {log}"
