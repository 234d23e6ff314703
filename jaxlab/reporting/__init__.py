"""From results of runs to verdicts and pages. What is about one paper stands apart, in `papers`."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.reporting.assemble import build_sections, compose, render, split_by_form
    from jaxlab.reporting.folders import RunFolder, read_finished, read_run, read_runs
    from jaxlab.reporting.formats import duration
    from jaxlab.reporting.merge_diagnosis import diagnosis_page
    from jaxlab.reporting.page import Section
    from jaxlab.reporting.papers import CLAIMS
    from jaxlab.reporting.papers.label_words.prompt_widget import prompt_page
    from jaxlab.reporting.papers.label_words.section import verdicts as icl_verdicts
    from jaxlab.reporting.verdicts import Claim, Verdict
