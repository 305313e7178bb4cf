# Preference pairs of this run (section 3.3), and general preference data in the same form.


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


rule read_preferences:
    input:
        raw=flow.raw_by_name,
    output:
        train=flow.results("05_pairs/{source}/train.jsonl"),
        dev=flow.results("05_pairs/{source}/dev.jsonl"),
        test=flow.results("05_pairs/{source}/test.jsonl"),
        dropped=flow.results("05_pairs/{source}/dropped.jsonl"),
    log:
        flow.logs("read_preferences/{source}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.read_preferences,
        code=code("read_preferences"),
    message:
        "Read the preference pairs of {wildcards.source}"
    shell:
        "python scripts/read_preferences.py --raw {input.raw:q} --settings {params.settings:q}"
        " --train {output.train} --dev {output.dev} --test {output.test} --dropped {output.dropped} 2> {log}"
