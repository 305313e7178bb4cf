# Tables, figures, cards and the report: every figure of the paper beside the measured one.


rule make_tables:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        dropped=flow.dropped_rows(),
        unanswered=flow.unanswered(),
        unscored=flow.unscored(),
        scores=flow.results("04_ratings/scores.jsonl"),
        pairs=expand(flow.results("05_pairs/{split}.jsonl"), split=["train", "dev", "test"]),
        judge=flow.judge_assessment(),
        metrics=[*flow.scorers_with_metrics(), *flow.benchmark_metrics()],
        win_rates=[*flow.win_rates(), *flow.win_rates_again(), *flow.checkpoint_win_rates()],
        assessments=flow.assessments(),
        contamination=flow.results("05_pairs/contamination.json"),
        differences=flow.differences(),
        agreement=flow.agreement_of_judges(),
        taxonomy=config["files"]["taxonomy"],
        paper=config["files"]["paper"],
    output:
        html=expand(flow.results("10_tables/{table}.html"), table=pages.tables()),
        csv=[
            report(
                flow.results(f"10_tables/{table}.csv"),
                caption=f"../report/table_{table}.rst",
                category="Tables",
                labels={"table": table},
            )
            for table in pages.tables()
        ],
        markdown=expand(flow.results("10_tables/{table}.md"), table=pages.tables()),
        latex=expand(flow.results("10_tables/{table}.tex"), table=pages.tables()),
    log:
        flow.logs("make_tables.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=pages.make_tables,
        code=code("make_tables"),
        options=pages.table_options(),
        folder=output_folder,
    message:
        "Make the tables"
    shell:
        "python scripts/make_tables.py --speeches {input.speeches} --dropped {input.dropped} --unanswered {input.unanswered}"
        " --unscored {input.unscored} --scores {input.scores} --pairs {input.pairs} --judge {input.judge}"
        " --reward-metrics {input.metrics} --win-rates {input.win_rates}"
        " --contamination {input.contamination} {params.options}"
        " --taxonomy {input.taxonomy} --paper {input.paper} --settings {params.settings:q} --out-dir {params.folder} 2> {log}"


rule plot_figures:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        scores=flow.results("04_ratings/scores.jsonl"),
        pairs=expand(flow.results("05_pairs/{split}.jsonl"), split=["train", "dev", "test"]),
        judge=flow.judge_assessment(),
        win_rates=flow.win_rates(),
        checkpoints=flow.checkpoint_win_rates(),
        assessments=flow.assessments(),
        reward_logs=pages.reward_logs(),
        policy_logs=pages.policy_logs(),
        taxonomy=config["files"]["taxonomy"],
    output:
        svg=[
            report(
                flow.results(f"11_figures/{figure}.svg"),
                caption=f"../report/figure_{figure}.rst",
                category="Figures",
                labels={"figure": figure},
            )
            for figure in pages.figures()
        ],
        png=expand(flow.results("11_figures/{figure}.png"), figure=pages.figures()),
    log:
        flow.logs("plot_figures.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=pages.plot_figures,
        code=code("plot_figures"),
        options=pages.figure_options(),
        folder=output_folder,
    message:
        "Plot the figures"
    shell:
        "python scripts/plot_figures.py --speeches {input.speeches} --scores {input.scores} --pairs {input.pairs}"
        " --judge {input.judge}"
        " --win-rates {input.win_rates} {params.options} --taxonomy {input.taxonomy} --settings {params.settings:q}"
        " --out-dir {params.folder} 2> {log}"


rule write_cards:
    input:
        models=pages.card_models().values(),
        trainings=[file for _, file in pages.card_trainings()],
        metrics=[*flow.scorers_with_metrics(), *flow.benchmark_metrics()],
        win_rates=flow.win_rates(),
        template="report/model_card.md.jinja",
        ethics="report/ethics.md.jinja",
    output:
        models=expand(flow.results("12_cards/{name}.md"), name=pages.carded_models()),
    log:
        flow.logs("write_cards.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=pages.write_cards,
        code=code("write_cards"),
        models=pages.card_options(),
        folder=output_folder,
    message:
        "Write the cards of the models"
    shell:
        "python scripts/write_cards.py {params.models} --reward-metrics {input.metrics} --win-rates {input.win_rates}"
        " --settings {params.settings:q} --out-dir {params.folder} 2> {log}"


rule choose_cases:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        judgements=pages.case_files("09_judgements"),
        answers=pages.case_files("08_answers"),
        opponent=flow.results("08_answers/opponent.jsonl"),
    output:
        csv=report(
            flow.results("10_tables/case_studies.csv"),
            caption="../report/table_case_studies.rst",
            category="Tables",
            labels={"table": "case_studies"},
        ),
        others=expand(flow.results("10_tables/case_studies.{ending}"), ending=["md", "tex", "html"]),
    log:
        flow.logs("choose_cases.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=pages.choose_cases,
        code=code("choose_cases"),
        folder=output_folder,
    message:
        "Choose case studies"
    shell:
        "python scripts/choose_cases.py --speeches {input.speeches} --judgements {input.judgements} --answers {input.answers}"
        " --opponent {input.opponent} --settings {params.settings:q} --out-dir {params.folder} 2> {log}"


rule write_report:
    input:
        tables=expand(flow.results("10_tables/{table}.html"), table=pages.tables()),
        cases=[path for path in pages.case_tables() if path.endswith(".html")],
        figures=expand(flow.results("11_figures/{figure}.svg"), figure=pages.figures()),
        cards=expand(flow.results("12_cards/{name}.md"), name=pages.carded_models()),
        release=flow.results("13_release/README.md"),
        template="report/report.html.jinja",
    output:
        report=flow.results("report.html"),
        csv=report(flow.results("10_tables/costs.csv"), caption="../report/table_costs.rst", category="Tables", labels={"table": "costs"}),
        costs=expand(flow.results("10_tables/costs.{ending}"), ending=["md", "tex", "html"]),
    log:
        flow.logs("write_report.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=pages.write_report,
        code=code("write_report"),
        run_dir=output_folder,
        tables=costs_folder,
    message:
        "Write the report"
    shell:
        "python scripts/write_report.py --tables {input.tables} {input.cases} --figures {input.figures}"
        " --run-dir {params.run_dir} --settings {params.settings:q} --out-dir {params.tables} --out {output.report} 2> {log}"


rule summarise_run:
    input:
        speeches=flow.results("02_speeches/speeches.jsonl"),
        pairs=expand(flow.results("05_pairs/{split}.jsonl"), split=["train", "dev", "test"]),
        metrics=flow.scorers_with_metrics(),
        win_rates=flow.win_rates(),
    output:
        summary=flow.results("summary.txt"),
    log:
        flow.logs("summarise_run.log"),
    conda:
        "../envs/data.yaml"
    params:
        settings=pages.summarise_run,
        code=code("summarise_run"),
    message:
        "Summarise the run"
    shell:
        "python scripts/summarise_run.py --speeches {input.speeches} --pairs {input.pairs} --reward-metrics {input.metrics}"
        " --win-rates {input.win_rates} --settings {params.settings:q} --out {output.summary} 2> {log}"
