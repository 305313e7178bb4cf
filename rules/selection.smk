# Client speeches of all sources: normalised, filtered, de-duplicated (section 3.1).


rule select_speeches:
    input:
        sources=expand(flow.results("01_sources/{source}.jsonl"), source=flow.speech_sources),
    output:
        speeches=flow.results("02_speeches/unique.jsonl"),
        dropped=flow.results("02_speeches/dropped.jsonl"),
    log:
        flow.logs("select_speeches.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.select_speeches,
        code=code("select_speeches"),
    message:
        "Select speeches by length and drop duplicates"
    shell:
        "python scripts/select_speeches.py --sources {input.sources} --settings {params.settings:q}"
        " --out {output.speeches} --dropped {output.dropped} 2> {log}"
