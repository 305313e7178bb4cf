# Near duplicates between what is tested on and what is trained on.


rule report_contamination:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        pairs=expand(flow.results("05_pairs/{split}.jsonl"), split=["train", "dev", "test"]),
        others=flow.other_preferences(),
    output:
        report=flow.results("05_pairs/contamination.json"),
    log:
        flow.logs("report_contamination.log"),
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=4000,
    params:
        settings=slices.report_contamination,
        code=code("report_contamination"),
        options=flow.contamination_options(),
    message:
        "Look for near duplicates of what is tested on in what is trained on"
    shell:
        "python scripts/report_contamination.py --speeches {input.speeches} --pairs {input.pairs} {params.options}"
        " --settings {params.settings:q} --out {output.report} 2> {log}"
