# Raw files, checked against their sha256, and the client speeches (section 3.1) or general preference pairs in them.


rule fetch_source:
    output:
        raw=flow.work("sources/{source}/{file}"),
    log:
        flow.logs("fetch_source/{source}/{file}.log"),
    localrule: True
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.fetch_source,
        code=code("fetch_source"),
        cache=cache_option,
    message:
        "Fetch the raw file of {wildcards.source}"
    shell:
        "python scripts/fetch_source.py {params.cache} --settings {params.settings:q} --out {output.raw:q} 2> {log:q}"


rule read_source:
    input:
        raw=flow.raw_by_name,
    output:
        rows=flow.results("01_sources/{source}.jsonl"),
        dropped=flow.results("01_sources/{source}.dropped.jsonl"),
    log:
        flow.logs("read_source/{source}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.read_source,
        code=code("read_source"),
    message:
        "Read the client speeches of {wildcards.source}"
    shell:
        "python scripts/read_source.py --raw {input.raw:q} --settings {params.settings:q}"
        " --out {output.rows} --dropped {output.dropped} 2> {log}"


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
