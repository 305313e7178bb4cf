# Win rates against the opponent on the test speeches: answers, judgements, parse, rates (section 4.2, Table 3; 4.3, Figure 4).


rule answer_opponent:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        weights=flow.weights(config["evaluation"]["opponent"]),
    output:
        answers=flow.results("08_answers/opponent.jsonl"),
        failed=flow.results("08_answers/opponent.failed.jsonl"),
    log:
        flow.logs("answer_opponent.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        remote=flow.remote_slots(config["evaluation"]["opponent"]),
        gpu=flow.gpus(config["evaluation"]["opponent"]),
        mem_mb=8000,
        runtime=240,
    params:
        settings=slices.answer_opponent,
        code=code("generate_responses"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        journal=flow.work("journal/answers/opponent.jsonl"),
    message:
        "The opponent answers the test speeches"
    shell:
        "python scripts/generate_responses.py --speeches {input.speeches} --split test {params.weights} --settings {params.settings:q}"
        " --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
        " --out {output.answers} --failed {output.failed} 2> {log}"


rule answer_speeches:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        opponent=flow.results("08_answers/opponent.jsonl"),
        weights=flow.policy_weights,
    output:
        free=flow.results("08_answers/{policy}/free.jsonl"),
        length=flow.results("08_answers/{policy}/length.jsonl"),
        failed=flow.results("08_answers/{policy}/failed.jsonl"),
    log:
        flow.logs("answer_speeches/{policy}.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        remote=flow.policy_remote_slots,
        gpu=flow.policy_gpus,
        mem_mb=8000,
        runtime=240,
    params:
        settings=slices.answer_speeches,
        code=code("generate_responses"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        journal=flow.work("journal/answers/{policy}.jsonl"),
    message:
        "{wildcards.policy} answers the test speeches in both settings"
    shell:
        "python scripts/generate_responses.py --speeches {input.speeches} --split test {params.weights} --settings {params.settings:q}"
        " --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal} --length-of {input.opponent}"
        " --out {output.free} --out-length {output.length} --failed {output.failed} 2> {log}"


rule judge_answers:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        answers=flow.results("08_answers/{policy}/{setting}.jsonl"),
        opponent=flow.results("08_answers/opponent.jsonl"),
        weights=flow.weights(config["evaluation"]["judge"]),
    output:
        answers=flow.results("09_judgements/{policy}/{setting}.answers.jsonl"),
        failed=flow.results("09_judgements/{policy}/{setting}.answers.failed.jsonl"),
    log:
        flow.logs("judge_answers/{policy}.{setting}.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        remote=flow.remote_slots(config["evaluation"]["judge"]),
        gpu=flow.gpus(config["evaluation"]["judge"]),
        mem_mb=8000,
        runtime=720,
    params:
        settings=slices.judge_answers,
        code=code("judge_answers"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        journal=flow.work("journal/judgements/{policy}.{setting}.jsonl"),
    message:
        "Judge {wildcards.policy} against the opponent, setting {wildcards.setting}, both orders"
    shell:
        "python scripts/judge_answers.py --speeches {input.speeches} --answers {input.answers} --opponent {input.opponent} {params.weights}"
        " --settings {params.settings:q} --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
        " --out {output.answers} --failed {output.failed} 2> {log}"


rule parse_judgements:
    input:
        answers=flow.results("09_judgements/{policy}/{setting}.answers.jsonl"),
    output:
        judgements=flow.results("09_judgements/{policy}/{setting}.jsonl"),
        failed=flow.results("09_judgements/{policy}/{setting}.failed.jsonl"),
    log:
        flow.logs("parse_judgements/{policy}.{setting}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.parse_judgements,
        code=code("parse_judgements"),
    message:
        "Parse the judgements of {wildcards.policy}, setting {wildcards.setting}"
    shell:
        "python scripts/parse_judgements.py --answers {input.answers} --settings {params.settings:q}"
        " --out {output.judgements} --failed {output.failed} 2> {log}"


rule compute_win_rates:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        judgements=flow.results("09_judgements/{policy}/{setting}.jsonl"),
        answers=flow.results("08_answers/{policy}/{setting}.jsonl"),
        opponent=flow.results("08_answers/opponent.jsonl"),
    output:
        win_rates=flow.results("09_judgements/{policy}/{setting}.win_rates.json"),
    log:
        flow.logs("compute_win_rates/{policy}.{setting}.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.compute_win_rates,
        code=code("compute_win_rates"),
    message:
        "Win rates of {wildcards.policy}, setting {wildcards.setting}"
    shell:
        "python scripts/compute_win_rates.py --speeches {input.speeches} --judgements {input.judgements}"
        " --answers {input.answers} --opponent {input.opponent} --settings {params.settings:q} --out {output.win_rates} 2> {log}"


rule compare_policies:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        judgements=flow.judgements(),
    output:
        differences=flow.results("09_judgements/differences.json"),
    log:
        flow.logs("compare_policies.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.compare_policies,
        code=code("compare_policies"),
    message:
        "Compare policies with each other, paired by speech"
    shell:
        "python scripts/compare_policies.py --speeches {input.speeches} --judgements {input.judgements}"
        " --settings {params.settings:q} --out {output.differences} 2> {log}"


# Figure 4 and the monitor of over-optimisation: every checkpoint of the listed policies, numbered through all rounds of its training,
# in the free setting, on a stratified part of the test speeches. Checkpoint 0 is the base: {policy} is its own name then, but in its
# assessment, which is that of a policy's reward model.


rule sample_test_speeches:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
    output:
        speeches=flow.results("08_answers/checkpoint_speeches.jsonl"),
    log:
        flow.logs("sample_test_speeches.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.sample_test_speeches,
        code=code("sample_prompts"),
    message:
        "Draw the test speeches on which checkpoints are judged"
    shell:
        "python scripts/sample_prompts.py --speeches {input.speeches} --settings {params.settings:q} --out {output.speeches} 2> {log}"


rule answer_checkpoint:
    input:
        speeches=flow.results("08_answers/checkpoint_speeches.jsonl"),
        checkpoints=flow.checkpoint_list,
    output:
        answers=flow.results("08_answers/{policy}/checkpoint-{checkpoint}.jsonl"),
        failed=flow.results("08_answers/{policy}/checkpoint-{checkpoint}.failed.jsonl"),
    log:
        flow.logs("answer_checkpoint/{policy}.{checkpoint}.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        gpu=flow.checkpoint_gpus,
        mem_mb=8000,
        runtime=120,
    params:
        settings=slices.answer_checkpoint,
        code=code("generate_responses"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=flow.checkpoint_weights,
        journal=flow.work("journal/answers/{policy}.checkpoint-{checkpoint}.jsonl"),
    message:
        "Checkpoint {wildcards.checkpoint} of {wildcards.policy} answers"
    shell:
        "python scripts/generate_responses.py --speeches {input.speeches} {params.weights} --settings {params.settings:q}"
        " --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
        " --out {output.answers} --failed {output.failed} 2> {log}"


rule assess_checkpoint:
    input:
        speeches=flow.results("08_answers/checkpoint_speeches.jsonl"),
        answers=flow.checkpoint_answers,
        opponent=flow.results("08_answers/opponent.jsonl"),
        checkpoints=flow.checkpoint_lists,
        base=flow.policy_base,
        reward_model=flow.ranking_reward_model,
        metrics=flow.ranking_metrics,
    output:
        assessment=flow.results("08_answers/{policy}/checkpoint-{checkpoint}.assessment.json"),
    log:
        flow.logs("assess_checkpoint/{policy}.{checkpoint}.log"),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        settings=slices.assess_checkpoint,
        code=code("assess_checkpoint"),
        weights=flow.assessed_weights,
        base=flow.base_option,
    message:
        "Rewards, distance from the base and repetition of checkpoint {wildcards.checkpoint} of {wildcards.policy}"
    shell:
        "python scripts/assess_checkpoint.py --speeches {input.speeches} --answers {input.answers} --opponent {input.opponent}"
        " --checkpoints {input.checkpoints} {params.weights} {params.base} --reward-weights {input.reward_model} --metrics {input.metrics}"
        " --settings {params.settings:q} --reuse work/cache --out {output.assessment} 2> {log}"


use rule judge_answers as judge_checkpoint with:
    input:
        speeches=flow.results("08_answers/checkpoint_speeches.jsonl"),
        answers=flow.results("08_answers/{policy}/checkpoint-{checkpoint}.jsonl"),
        opponent=flow.results("08_answers/opponent.jsonl"),
        weights=flow.weights(config["evaluation"]["judge"]),
    output:
        answers=flow.results("09_judgements/{policy}/checkpoint-{checkpoint}.answers.jsonl"),
        failed=flow.results("09_judgements/{policy}/checkpoint-{checkpoint}.answers.failed.jsonl"),
    log:
        flow.logs("judge_checkpoint/{policy}.{checkpoint}.log"),
    params:
        settings=slices.judge_checkpoint,
        code=code("judge_answers"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        journal=flow.work("journal/judgements/{policy}.checkpoint-{checkpoint}.jsonl"),
    message:
        "Judge checkpoint {wildcards.checkpoint} of {wildcards.policy}"


use rule parse_judgements as parse_checkpoint with:
    input:
        answers=flow.results("09_judgements/{policy}/checkpoint-{checkpoint}.answers.jsonl"),
    output:
        judgements=flow.results("09_judgements/{policy}/checkpoint-{checkpoint}.jsonl"),
        failed=flow.results("09_judgements/{policy}/checkpoint-{checkpoint}.failed.jsonl"),
    log:
        flow.logs("parse_checkpoint/{policy}.{checkpoint}.log"),
    params:
        settings=slices.parse_checkpoint,
        code=code("parse_judgements"),
    message:
        "Parse the judgements of checkpoint {wildcards.checkpoint} of {wildcards.policy}"


use rule compute_win_rates as compute_checkpoint_win_rate with:
    input:
        speeches=flow.results("08_answers/checkpoint_speeches.jsonl"),
        judgements=flow.results("09_judgements/{policy}/checkpoint-{checkpoint}.jsonl"),
        answers=flow.results("08_answers/{policy}/checkpoint-{checkpoint}.jsonl"),
        opponent=flow.results("08_answers/opponent.jsonl"),
    output:
        win_rates=flow.results("09_judgements/{policy}/checkpoint-{checkpoint}.win_rates.json"),
    log:
        flow.logs("compute_checkpoint_win_rate/{policy}.{checkpoint}.log"),
    params:
        settings=slices.compute_checkpoint_win_rate,
        code=code("compute_win_rates"),
    message:
        "Win rate of checkpoint {wildcards.checkpoint} of {wildcards.policy}"


# A second judge, where the config names one: the same answers, or those to a stratified part of the test speeches.


if len(flow.judges_of_answers) > 1:

    use rule sample_test_speeches as sample_judged_again with:
        output:
            speeches=flow.results("09_judgements/second_judge/speeches.jsonl"),
        log:
            flow.logs("sample_judged_again.log"),
        params:
            settings=slices.sample_judged_again,
            code=code("sample_prompts"),
        message:
            "Draw the test speeches that the second judge sees"

    use rule judge_answers as judge_again with:
        input:
            speeches=flow.results("09_judgements/second_judge/speeches.jsonl"),
            answers=flow.results("08_answers/{policy}/{setting}.jsonl"),
            opponent=flow.results("08_answers/opponent.jsonl"),
            weights=flow.weights(flow.judges_of_answers[1]),
        output:
            answers=flow.results("09_judgements/second_judge/{policy}/{setting}.answers.jsonl"),
            failed=flow.results("09_judgements/second_judge/{policy}/{setting}.answers.failed.jsonl"),
        log:
            flow.logs("judge_again/{policy}.{setting}.log"),
        resources:
            remote=flow.remote_slots(flow.judges_of_answers[1]),
            gpu=flow.gpus(flow.judges_of_answers[1]),
            mem_mb=8000,
            runtime=720,
        params:
            settings=slices.judge_again,
            code=code("judge_answers"),
            endpoints=endpoints_file,
            gpus=gpus_option,
            money=money_options,
            weights=weights_option,
            journal=flow.work("journal/judgements/second_judge/{policy}.{setting}.jsonl"),
        message:
            "A second judge compares {wildcards.policy} with the opponent, setting {wildcards.setting}, both orders"

    use rule parse_judgements as parse_judged_again with:
        input:
            answers=flow.results("09_judgements/second_judge/{policy}/{setting}.answers.jsonl"),
        output:
            judgements=flow.results("09_judgements/second_judge/{policy}/{setting}.jsonl"),
            failed=flow.results("09_judgements/second_judge/{policy}/{setting}.failed.jsonl"),
        log:
            flow.logs("parse_judged_again/{policy}.{setting}.log"),
        params:
            settings=slices.parse_judged_again,
            code=code("parse_judgements"),
        message:
            "Parse the second judge's comparisons of {wildcards.policy}, setting {wildcards.setting}"

    use rule compute_win_rates as compute_win_rates_again with:
        input:
            speeches=flow.results("09_judgements/second_judge/speeches.jsonl"),
            judgements=flow.results("09_judgements/second_judge/{policy}/{setting}.jsonl"),
            answers=flow.results("08_answers/{policy}/{setting}.jsonl"),
            opponent=flow.results("08_answers/opponent.jsonl"),
        output:
            win_rates=flow.results("09_judgements/second_judge/{policy}/{setting}.win_rates.json"),
        log:
            flow.logs("compute_win_rates_again/{policy}.{setting}.log"),
        params:
            settings=slices.compute_win_rates_again,
            code=code("compute_win_rates"),
        message:
            "Win rates of {wildcards.policy} under the second judge, setting {wildcards.setting}"

    rule compare_judges:
        input:
            judgements=flow.judgements(),
            second=flow.judgements(SECOND_JUDGE),
        output:
            agreement=flow.results("09_judgements/second_judge/agreement.json"),
        log:
            flow.logs("compare_judges.log"),
        conda:
            "../envs/data.yaml"
        params:
            settings=slices.compare_judges,
            code=code("compare_judges"),
        message:
            "How far do the two judges agree?"
        shell:
            "python scripts/compare_judges.py --judgements {input.judgements} --second {input.second}"
            " --settings {params.settings:q} --out {output.agreement} 2> {log}"
