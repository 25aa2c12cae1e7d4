"""Reports that are partly written by hand keep that part when their script writes them anew."""

from pathlib import Path

from by_hand import SAID, write_report

BENCH = Path(__file__).parent / "bench"
REPORTS = BENCH.parents[1] / "docs" / "benchmarks"


def test_what_stands_below_the_line_is_kept(tmp_path):
    page = tmp_path / "page.md"
    write_report(page, ["# Title", "", "| old |"])
    page.write_text(page.read_text(encoding="utf-8") + "\nA table shows it.\n", encoding="utf-8")
    for _ in range(2):
        write_report(page, ["# Title", "", "| new |"])
    assert page.read_text(encoding="utf-8") == f"# Title\n\n| new |\n\n{SAID}\n\nA table shows it.\n"


def test_each_such_report_has_the_line():
    reports = {"comfyui_lora": "comfyui"} | {name: name for name in ("new_family", "stop_regret", "gain_trials")}
    for script, report in reports.items():
        assert f'write_report(args.report / "{report}.md"' in (BENCH / f"{script}.py").read_text(encoding="utf-8")
        assert (REPORTS / f"{report}.md").read_text(encoding="utf-8").count(f"\n{SAID}\n") == 1
