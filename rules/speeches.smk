# A topic and a side of the split for each client speech (section 3.1).


if flow.topics_by_embedding:

    rule embed_topics:
        input:
            speeches=flow.results("02_speeches/unique.jsonl"),
            weights=flow.weights(config["topics"]["judge"]),
        output:
            topics=flow.results("02_speeches/topics.jsonl"),
        log:
            flow.logs("embed_topics.log"),
        conda:
            "../envs/train.yaml"
        threads: 2
        resources:
            mem_mb=4000,
            runtime=60,
        params:
            settings=slices.embed_topics,
            code=code("embed_topics"),
        message:
            "Give each speech the nearest of the 42 topics"
        shell:
            "python scripts/embed_topics.py --speeches {input.speeches} --weights {input.weights} --settings {params.settings:q}"
            " --out {output.topics} 2> {log}"

else:

    rule label_topics:
        input:
            speeches=flow.results("02_speeches/unique.jsonl"),
            weights=flow.weights(config["topics"]["judge"]),
        output:
            topics=flow.results("02_speeches/topics.jsonl"),
            failed=flow.results("02_speeches/topics.failed.jsonl"),
        log:
            flow.logs("label_topics.log"),
        conda:
            "../envs/serve.yaml"
        resources:
            remote=flow.remote_slots(config["topics"]["judge"]),
            gpu=flow.gpus(config["topics"]["judge"]),
            mem_mb=8000,
            runtime=720,
        params:
            settings=slices.label_topics,
            code=code("label_topics"),
            endpoints=endpoints_file,
            gpus=gpus_option,
            money=money_options,
            weights=weights_option,
            journal=flow.work("journal/label_topics.jsonl"),
        message:
            "Give each speech one of the 42 topics"
        shell:
            "python scripts/label_topics.py --speeches {input.speeches} {params.weights} --settings {params.settings:q}"
            " --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
            " --out {output.topics} --failed {output.failed} 2> {log}"


rule split_speeches:
    input:
        speeches=flow.results("02_speeches/unique.jsonl"),
        topics=flow.results("02_speeches/topics.jsonl"),
    output:
        speeches=flow.results("02_speeches/speeches.jsonl"),
    log:
        flow.logs("split_speeches.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.split_speeches,
        code=code("split_speeches"),
    message:
        "Split into train, dev and test"
    shell:
        "python scripts/split_speeches.py --speeches {input.speeches} --topics {input.topics} --settings {params.settings:q}"
        " --out {output.speeches} 2> {log}"
