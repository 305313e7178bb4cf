# The judge's scores on seven principles: raw answers, then the parse, then one score a response (sections 3.2, 3.3); and how far the
# judge agrees with itself and follows the order in which it sees responses.


rule rate_responses:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        responses=flow.pool_responses(),
        weights=flow.weights(config["ratings"]["judge"]),
    output:
        answers=flow.results("04_ratings/answers.jsonl"),
        failed=flow.results("04_ratings/answers.failed.jsonl"),
    log:
        flow.logs("rate_responses.log"),
    conda:
        "../envs/serve.yaml"
    resources:
        remote=flow.remote_slots(config["ratings"]["judge"]),
        gpu=flow.gpus(config["ratings"]["judge"]),
        mem_mb=8000,
        runtime=1440,
    params:
        settings=slices.rate_responses,
        code=code("rate_responses"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        journal=flow.work("journal/ratings.jsonl"),
    message:
        "Rate the responses on the seven principles"
    shell:
        "python scripts/rate_responses.py --speeches {input.speeches} --responses {input.responses} {params.weights}"
        " --settings {params.settings:q} --endpoints {params.endpoints} {params.gpus} {params.money} --journal {params.journal}"
        " --out {output.answers} --failed {output.failed} 2> {log}"


rule parse_ratings:
    input:
        answers=flow.results("04_ratings/answers.jsonl"),
    output:
        ratings=flow.results("04_ratings/ratings.jsonl"),
        failed=flow.results("04_ratings/ratings.failed.jsonl"),
    log:
        flow.logs("parse_ratings.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.parse_ratings,
        code=code("parse_ratings"),
    message:
        "Parse the judge's answers"
    shell:
        "python scripts/parse_ratings.py --answers {input.answers} --settings {params.settings:q}"
        " --out {output.ratings} --failed {output.failed} 2> {log}"


rule score_responses:
    input:
        ratings=flow.results("04_ratings/ratings.jsonl"),
        responses=flow.pool_responses(),
    output:
        scores=flow.results("04_ratings/scores.jsonl"),
        dropped=flow.results("04_ratings/scores.dropped.jsonl"),
    log:
        flow.logs("score_responses.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.score_responses,
        code=code("score_responses"),
    message:
        "Average the seven scores of each response"
    shell:
        "python scripts/score_responses.py --ratings {input.ratings} --responses {input.responses} --settings {params.settings:q}"
        " --out {output.scores} --dropped {output.dropped} 2> {log}"


use rule rate_responses as rate_again with:
    output:
        answers=flow.results("04_ratings/again/{order}.answers.jsonl"),
        failed=flow.results("04_ratings/again/{order}.answers.failed.jsonl"),
    log:
        flow.logs("rate_again/{order}.log"),
    params:
        settings=slices.rate_again,
        code=code("rate_responses"),
        endpoints=endpoints_file,
        gpus=gpus_option,
        money=money_options,
        weights=weights_option,
        journal=flow.work("journal/ratings_again/{order}.jsonl"),
    message:
        "Rate a sample again, in {wildcards.order} order"


use rule parse_ratings as parse_again with:
    input:
        answers=flow.results("04_ratings/again/{order}.answers.jsonl"),
    output:
        ratings=flow.results("04_ratings/again/{order}.jsonl"),
        failed=flow.results("04_ratings/again/{order}.failed.jsonl"),
    log:
        flow.logs("parse_again/{order}.log"),
    params:
        settings=slices.parse_again,
        code=code("parse_ratings"),
    message:
        "Parse the answers of the sample rated again, in {wildcards.order} order"


rule assess_judge:
    input:
        ratings=flow.results("04_ratings/ratings.jsonl"),
        again=flow.ratings_again(),
    output:
        judge=flow.results("04_ratings/judge.json"),
    log:
        flow.logs("assess_judge.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=slices.assess_judge,
        code=code("assess_judge"),
        again=again_option,
    message:
        "Assess how far the judge agrees with itself"
    shell:
        "python scripts/assess_judge.py --ratings {input.ratings} {params.again} --settings {params.settings:q}"
        " --out {output.judge} 2> {log}"
