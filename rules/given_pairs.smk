# A run that starts at preference pairs: these rules stand for those that select speeches, ask the pool, rate and build pairs.


rule read_pairs:
    input:
        raw=flow.given_pairs(),
    output:
        speeches=flow.results("02_speeches/unique.jsonl"),
        dropped=flow.results("02_speeches/dropped.jsonl"),
        responses=flow.results("03_responses/given.jsonl"),
        scores=flow.results("04_ratings/scores.jsonl"),
        pairs=flow.results("05_pairs/given.jsonl"),
    log:
        flow.logs("read_pairs.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.read_pairs,
        code=code("read_pairs"),
    message:
        "Take the given pairs apart into speeches, responses and scores"
    shell:
        "python scripts/read_pairs.py --raw {input.raw:q} --settings {params.settings:q} --speeches {output.speeches}"
        " --responses {output.responses} --scores {output.scores} --pairs {output.pairs} --dropped {output.dropped} 2> {log}"


rule divide_pairs:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        pairs=flow.results("05_pairs/given.jsonl"),
    output:
        train=flow.results("05_pairs/train.jsonl"),
        dev=flow.results("05_pairs/dev.jsonl"),
        test=flow.results("05_pairs/test.jsonl"),
    log:
        flow.logs("divide_pairs.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.divide_pairs,
        code=code("divide_pairs"),
    message:
        "Divide the given pairs into train, dev and test"
    shell:
        "python scripts/divide_pairs.py --speeches {input.speeches} --pairs {input.pairs} --settings {params.settings:q}"
        " --train {output.train} --dev {output.dev} --test {output.test} 2> {log}"
