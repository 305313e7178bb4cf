# Policies: DPO on the run's pairs, and iterative DPO on pairs sampled from the newest policy (section 4.2).
# A training leaves evenly spaced checkpoints in checkpoints/<k>/; checkpoints.json lists them by their manifests' sha256
# and stands for them in rules. The checkpoint that is best on the dev pairs becomes model/. The weights of the others are removed once
# nothing needs them (docs/disk.md): not declared, they go without a rerun, and their manifests stay.

ROUND = flow.results("07_policies/{policy}/iteration-{iteration}")


rule sample_prompts:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
    output:
        speeches=f"{ROUND}/speeches.jsonl",
    log:
        flow.logs("sample_prompts/{policy}.{iteration}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.sample_prompts,
        code=code("sample_prompts"),
    message:
        "Draw the training speeches of {wildcards.policy}, iteration {wildcards.iteration}"
    shell:
        "python scripts/sample_prompts.py --speeches {input.speeches} --settings {params.settings:q} --out {output.speeches} 2> {log}"


rule sample_responses:
    input:
        speeches=f"{ROUND}/speeches.jsonl",
        newest=flow.round_before,
    output:
        samples=f"{ROUND}/samples.jsonl",
        failed=f"{ROUND}/samples.failed.jsonl",
    log:
        flow.logs("sample_responses/{policy}.{iteration}.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        gpu=flow.policy_gpus,
        mem_mb=8000,
        runtime=480,
    params:
        settings=slices.sample_responses,
        code=code("generate_responses"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=flow.sampling_weights,
        journal=flow.work("journal/samples/{policy}.{iteration}.jsonl"),
    message:
        "Sample answers of {wildcards.policy}, iteration {wildcards.iteration}"
    shell:
        "python scripts/generate_responses.py --speeches {input.speeches} {params.weights} --settings {params.settings:q}"
        " --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
        " --out {output.samples} --failed {output.failed} 2> {log}"


rule rank_samples:
    input:
        speeches=f"{ROUND}/speeches.jsonl",
        samples=f"{ROUND}/samples.jsonl",
        reward_model=flow.ranking_reward_model,
        metrics=flow.ranking_metrics,  # not ancient: Snakemake would then miss changed params wherever the metrics are made anew
    output:
        pairs=f"{ROUND}/pairs.jsonl",
        rewards=f"{ROUND}/rewards.jsonl",
        dropped=f"{ROUND}/pairs.dropped.jsonl",
    log:
        flow.logs("rank_samples/{policy}.{iteration}.log"),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        gpu=flow.policy_gpus,
        mem_mb=8000,
        runtime=120,
    params:
        settings=slices.rank_samples,
        code=code("rank_samples"),
        chance=chance_option,
    message:
        "Rank the samples of {wildcards.policy}, iteration {wildcards.iteration}, by reward"
    shell:
        "python scripts/rank_samples.py --speeches {input.speeches} --samples {input.samples} --reward-weights {input.reward_model}"
        " --metrics {input.metrics} {params.chance} --settings {params.settings:q} --reuse work/cache"
        " --pairs {output.pairs} --rewards {output.rewards} --dropped {output.dropped} 2> {log}"


rule train_policy:
    input:
        pairs=flow.round_pairs,
        before=flow.round_before,
    output:
        checkpoints=f"{ROUND}/checkpoints.json",
        log=f"{ROUND}/training.json",
    log:
        flow.logs("train_policy/{policy}.{iteration}.log"),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=1440,
    params:
        settings=slices.train_policy,
        code=code("train_policy"),
        launcher=training_launcher,
        start=flow.start_options,
        folder=checkpoints_folder,
        resume=flow.work("checkpoints/policies/{policy}.{iteration}"),
    message:
        "Train {wildcards.policy}, iteration {wildcards.iteration}, by DPO"
    shell:
        "{params.launcher} scripts/train_policy.py --pairs {input.pairs} {params.start} --settings {params.settings:q}"
        " --resume-dir {params.resume} --reuse work/cache --checkpoints {params.folder} --out {output.checkpoints} --log {output.log} 2> {log}"


rule score_checkpoints:
    input:
        checkpoints=f"{ROUND}/checkpoints.json",
        dev=flow.results("05_pairs/dev.jsonl"),
        weights=flow.policy_base,
    output:
        scores=f"{ROUND}/dev_scores.json",
    log:
        flow.logs("score_checkpoints/{policy}.{iteration}.log"),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        settings=slices.score_checkpoints,
        code=code("score_checkpoints"),
        weights=weights_option,
    message:
        "Score the checkpoints of {wildcards.policy}, iteration {wildcards.iteration}, on the dev pairs"
    shell:
        "python scripts/score_checkpoints.py --checkpoints {input.checkpoints} {params.weights} --dev {input.dev}"
        " --settings {params.settings:q} --reuse work/cache --out {output.scores} 2> {log}"


rule select_checkpoint:
    input:
        rounds=flow.rounds,
        scores=flow.round_scores,
    output:
        manifest=flow.results("07_policies/{policy}/model/manifest.json"),
        scores=flow.results("07_policies/{policy}/dev_scores.json"),
    log:
        flow.logs("select_checkpoint/{policy}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.select_checkpoint,
        code=code("select_checkpoint"),
    message:
        "Select the checkpoint of {wildcards.policy} on the dev pairs"
    shell:
        "python scripts/select_checkpoint.py --checkpoints {input.rounds} --round-scores {input.scores} --settings {params.settings:q}"
        " --out {output.manifest} --scores {output.scores} 2> {log}"


# Weights that no later stage needs go as soon as all who read them have ended; ready at once, it runs before other jobs.


rule remove_checkpoints:
    input:
        rounds=flow.rounds_so_far,
        scores=flow.round_scores_so_far,
        readers=flow.checkpoint_readers,  # must have ended
    output:
        removed=f"{ROUND}/removed.json",
    log:
        flow.logs("remove_checkpoints/{policy}.{iteration}.log"),
    priority: 1
    localrule: True
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.remove_checkpoints,
        code=code("remove_checkpoints"),
        resume=flow.resume_folders,
    message:
        "Remove the checkpoints of {wildcards.policy} that are no longer needed after iteration {wildcards.iteration}"
    shell:
        "python scripts/remove_checkpoints.py --checkpoints {input.rounds} --round-scores {input.scores} --resume-dirs {params.resume}"
        " --cache work/cache --settings {params.settings:q} --out {output.removed} 2> {log}"
