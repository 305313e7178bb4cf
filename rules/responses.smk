# Four responses to each speech from a pool of models (section 3.3, Table 6); one file a model.


rule assign_models:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
    output:
        assignments=expand(flow.results("03_responses/assignments/{model}.jsonl"), model=flow.pool),
    log:
        flow.logs("assign_models.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.assign_models,
        code=code("assign_models"),
        folder=output_folder,
    message:
        "Assign models of the pool to speeches"
    shell:
        "python scripts/assign_models.py --speeches {input.speeches} --settings {params.settings:q} --out-dir {params.folder} 2> {log}"


rule generate_responses:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        assignment=flow.results("03_responses/assignments/{model}.jsonl"),
        weights=flow.pool_weights,
        recorded=flow.recorded_answers,
    output:
        responses=flow.results("03_responses/{model}.jsonl"),
        failed=flow.results("03_responses/{model}.failed.jsonl"),
    log:
        flow.logs("generate_responses/{model}.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        remote=flow.pool_remote_slots,
        gpu=flow.pool_gpus,
        mem_mb=8000,
        runtime=720,
    params:
        settings=slices.generate_responses,
        code=code("generate_responses"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        recorded=recorded_option,
        journal=flow.work("journal/responses/{model}.jsonl"),
    message:
        "{wildcards.model} answers its speeches"
    shell:
        "python scripts/generate_responses.py --speeches {input.speeches} --assignment {input.assignment}"
        " {params.weights} {params.recorded} --settings {params.settings:q}"
        " --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
        " --out {output.responses} --failed {output.failed} 2> {log}"
