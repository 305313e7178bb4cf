# Bradley-Terry reward models, published ones and prompted rankers on the test pairs (section 4.1, Tables 1 and 2).


rule train_reward_model:
    input:
        pairs=flow.training_pairs,
        dev=flow.dev_pairs,
        weights=flow.reward_model_base,
    output:
        manifest=flow.results("06_reward_models/{reward_model}/model/manifest.json"),
        log=flow.results("06_reward_models/{reward_model}/training.json"),
    log:
        flow.logs("train_reward_model/{reward_model}.log"),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=720,
    params:
        settings=slices.train_reward_model,
        code=code("train_reward_model"),
        launcher=training_launcher,
        weights=weights_option,
        checkpoints=flow.work("checkpoints/reward_models/{reward_model}"),
    message:
        "Train the reward model {wildcards.reward_model}"
    shell:
        "{params.launcher} scripts/train_reward_model.py --pairs {input.pairs} --dev {input.dev} {params.weights}"
        " --settings {params.settings:q} --resume-dir {params.checkpoints} --reuse work/cache"
        " --out {output.manifest} --log {output.log} 2> {log}"


rule score_pairs:
    input:
        pairs=flow.results("05_pairs/test.jsonl"),
        weights=flow.reward_model_weights,
    output:
        predictions=flow.results("06_reward_models/{reward_model}/predictions.jsonl"),
    log:
        flow.logs("score_pairs/{reward_model}.log"),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=slices.score_pairs,
        code=code("score_pairs"),
        weights=weights_option,
    message:
        "{wildcards.reward_model} scores the test pairs"
    shell:
        "python scripts/score_pairs.py --pairs {input.pairs} {params.weights} --settings {params.settings:q}"
        " --reuse work/cache --out {output.predictions} 2> {log}"


use rule score_pairs as score_benchmark with:
    input:
        pairs=flow.benchmark_pairs,
        weights=flow.reward_model_weights,
    output:
        predictions=flow.results("06_reward_models/{reward_model}/benchmark.predictions.jsonl"),
    log:
        flow.logs("score_benchmark/{reward_model}.log"),
    params:
        settings=slices.score_benchmark,
        code=code("score_pairs"),
        weights=weights_option,
    message:
        "{wildcards.reward_model} scores the general benchmark"


# A published reward model may be too large for one GPU: it is spread over as many as models.yaml says.


use rule score_pairs as score_baseline with:
    input:
        pairs=flow.results("05_pairs/test.jsonl"),
        weights=flow.baseline_weights,
    output:
        predictions=flow.results("06_reward_models/{baseline}/predictions.jsonl"),
    log:
        flow.logs("score_baseline/{baseline}.log"),
    resources:
        gpu=flow.baseline_gpus,
        mem_mb=8000,
        runtime=240,
    params:
        settings=slices.score_baseline,
        code=code("score_pairs"),
        weights=weights_option,
    message:
        "{wildcards.baseline} scores the test pairs"


rule rank_pairs:
    input:
        pairs=flow.results("05_pairs/test.jsonl"),
        weights=flow.ranker_weights,
    output:
        rankings=flow.results("06_reward_models/{ranker}/rankings.jsonl"),
        failed=flow.results("06_reward_models/{ranker}/rankings.failed.jsonl"),
    log:
        flow.logs("rank_pairs/{ranker}.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        remote=flow.ranker_remote_slots,
        gpu=flow.ranker_gpus,
        mem_mb=8000,
        runtime=240,
    params:
        settings=slices.rank_pairs,
        code=code("rank_pairs"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        journal=flow.work("journal/rankings/{ranker}.jsonl"),
    message:
        "{wildcards.ranker} ranks the test pairs in both orders"
    shell:
        "python scripts/rank_pairs.py --pairs {input.pairs} {params.weights} --settings {params.settings:q}"
        " --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
        " --out {output.rankings} --failed {output.failed} 2> {log}"


rule evaluate_rewards:
    input:
        pairs=flow.results("05_pairs/test.jsonl"),
        predictions=flow.results("06_reward_models/{scorer}/predictions.jsonl"),
    output:
        metrics=flow.results("06_reward_models/{scorer}/metrics.json"),
    log:
        flow.logs("evaluate_rewards/{scorer}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.evaluate_rewards,
        code=code("evaluate_rewards"),
    message:
        "Accuracy and calibration of {wildcards.scorer}"
    shell:
        "python scripts/evaluate_rewards.py --pairs {input.pairs} --predictions {input.predictions} --settings {params.settings:q}"
        " --out {output.metrics} 2> {log}"


use rule evaluate_rewards as evaluate_benchmark with:
    input:
        pairs=flow.benchmark_pairs,
        predictions=flow.results("06_reward_models/{reward_model}/benchmark.predictions.jsonl"),
    output:
        metrics=flow.results("06_reward_models/{reward_model}/benchmark.json"),
    log:
        flow.logs("evaluate_benchmark/{reward_model}.log"),
    params:
        settings=slices.evaluate_benchmark,
        code=code("evaluate_rewards"),
    message:
        "Benchmark scores of {wildcards.reward_model}"


rule evaluate_rankings:
    input:
        pairs=flow.results("05_pairs/test.jsonl"),
        rankings=flow.results("06_reward_models/{ranker}/rankings.jsonl"),
    output:
        metrics=flow.results("06_reward_models/{ranker}/metrics.json"),
    log:
        flow.logs("evaluate_rankings/{ranker}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.evaluate_rankings,
        code=code("evaluate_rewards"),
    message:
        "Accuracy and position bias of {wildcards.ranker}"
    shell:
        "python scripts/evaluate_rewards.py --pairs {input.pairs} --rankings {input.rankings} --settings {params.settings:q}"
        " --out {output.metrics} 2> {log}"
