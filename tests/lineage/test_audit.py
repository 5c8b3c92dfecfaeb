"""Every promise of docs/lineage.md, broken once: the audit names what broke; of an untouched tree it says nothing."""

import base64
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.mini_project import commit, run
from tve_pipeline.lineage.audit import Report, audit
from tve_pipeline.lineage.crate import crate
from tve_pipeline.lineage.files import records
from tve_pipeline.lineage.keys import own_signer, seal, unseal
from tve_pipeline.lineage.lock import in_order, load_lock
from tve_pipeline.lineage.page import page

STAGES = ("draw", "train", "export", "score")

SHARDS, MODEL = "data/mini/shards", "models/mini/model.bin"
EXPORT, METRIC = "models/mini/export", "results/mini/metrics.json"


def found(report: Report) -> set[tuple[str, str, str]]:
    return {(each.severity, each.kind, each.stage) for each in report.findings}


def flip(path: Path) -> None:
    """Another byte in the middle, size and times as they were."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(path.stat().st_mode | stat.S_IWUSR)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_lock(root: Path, edit: Callable[[dict], None]) -> None:
    document = yaml.safe_load((root / "dvc.lock").read_text())
    edit(document["stages"])
    (root / "dvc.lock").write_text(yaml.safe_dump(document))


def evidence(root: Path, stage: str) -> Path:
    """The one file of evidence that a stage has."""
    (file,) = (root / "evidence" / stage).iterdir()
    return file


def rewrite(root: Path, stage: str, change: Callable[[dict], None], signed: bool) -> None:
    path = evidence(root, stage)
    statement = unseal(path.read_bytes(), {}).statement
    change(statement)
    path.write_text(seal(statement, own_signer() if signed else None))


def test_an_untouched_tree_raises_nothing(project: Path) -> None:
    report = audit(project)
    assert report.findings == []
    assert (report.verdict, report.exit_code, report.first_broken) == ("OK", 0, "")
    assert [stage.name for stage in report.stages] == ["draw", "train", "export", "score"]
    assert {stage.standing for stage in report.stages} == {"trusted"}
    assert report.stages[1].seeds == {"train.seed": 1}
    assert report.stages[0].commit
    assert not report.stages[0].dirty


@pytest.mark.parametrize(
    ("path", "stage"),
    [(f"{SHARDS}/1.tar", "draw"), (MODEL, "train"), (f"{EXPORT}/weights.bin", "export"), (METRIC, "score")],
)
def test_a_byte_with_its_time_restored_is_found_where_dvc_sees_none(project: Path, path: str, stage: str) -> None:
    flip(project / path)
    report = audit(project)
    assert ("broken", "file", stage) in found(report)
    assert (report.exit_code, report.first_broken) == (1, stage)
    assert any(path in each.message for each in report.findings)


def test_two_shards_swapped(project: Path) -> None:
    one, other, aside = (project / SHARDS / name for name in ("0.tar", "1.tar", "aside"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    altered = {each.path for each in audit(project).findings if each.kind == "file" and each.stage == "draw"}
    assert altered == {f"{SHARDS}/0.tar", f"{SHARDS}/1.tar"}


def test_params_edited_after_the_run(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("steps: 3", "steps: 4"))
    report = audit(project)
    assert found(report) == {("broken", "params", name) for name in ("train", "export", "score")}
    assert "train.steps" in report.findings[0].message


@pytest.mark.parametrize("what", ["md5", "cmd", "params", "deps"])
def test_dvc_lock_edited(project: Path, what: str) -> None:
    def edit(stages: dict) -> None:
        train = stages["train"]
        if what == "md5":
            train["outs"][0]["md5"] = "0" * 32
        elif what == "cmd":
            train["cmd"] += " --fast"
        elif what == "params":
            train["params"]["params.yaml"]["train"]["steps"] = 30
        else:
            train["deps"] = train["deps"][:1]

    edit_lock(project, edit)
    assert ("broken", "lock", "train") in found(audit(project))


@pytest.mark.parametrize(
    "text",
    [
        "<<<<<<< HEAD\nstages: {}\n",
        "stages:\n  draw: {cmd: a, deps: [{md5: b}]}\n",
        "stages:\n  draw: {cmd: a, params: text}\n",
        "stages:\n  draw: {cmd: a, params: {params.yaml: text}}\n",
    ],
)
def test_a_dvc_lock_that_dvc_did_not_write_is_broken(project: Path, text: str) -> None:
    (project / "dvc.lock").write_text(text)
    assert found(audit(project)) == {("broken", "lock", "")}
    told = run("python", "-m", "tve_pipeline.cli", "audit", "--json", cwd=project, check=False)
    assert (told.returncode, json.loads(told.stdout)["verdict"]) == (1, "BROKEN")


def test_an_empty_dvc_lock_proves_nothing(project: Path) -> None:
    (project / "dvc.lock").write_text("stages: {}\n")
    assert found(audit(project)) == {("unproven", "lock", "")}


@pytest.mark.parametrize("name", ["/etc/hostname", "../../secret"])
def test_evidence_that_names_files_elsewhere_is_broken(project: Path, name: str) -> None:
    def change(statement: dict) -> None:
        statement["subject"][0]["name"] = name

    rewrite(project, "train", change, signed=False)
    assert ("broken", "evidence", "train") in found(audit(project))


def test_evidence_deleted(project: Path) -> None:
    evidence(project, "train").unlink()
    assert found(audit(project)) == {("broken", "evidence", "train")}


def test_evidence_altered_by_one_without_the_key(project: Path) -> None:
    path = evidence(project, "train")
    envelope = json.loads(path.read_text())
    statement = unseal(path.read_bytes(), {}).statement
    statement["predicate"]["runDetails"]["metadata"]["finishedOn"] = "2020-01-01T00:00:00Z"
    envelope["payload"] = json.loads(seal(statement, None))["payload"]
    path.write_text(json.dumps(envelope))
    assert found(audit(project)) == {("broken", "signature", "train")}


def test_evidence_signed_again_by_another_key_is_untrusted_not_broken(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVE_SIGNING_KEY", str(tmp_path / "other.pem"))
    rewrite(project, "train", lambda statement: None, signed=True)
    monkeypatch.setenv("TVE_SIGNING_KEY", "none")
    report = audit(project)
    assert found(report) == {("unproven", "signature", "train")}
    assert report.exit_code == 3


def test_evidence_without_a_signature_says_so(project: Path) -> None:
    rewrite(project, "train", lambda statement: None, signed=False)
    assert found(audit(project)) == {("unproven", "signature", "train")}


def test_evidence_of_another_stage_in_its_place(project: Path) -> None:
    shutil.copy(evidence(project, "export"), evidence(project, "train"))
    assert {("broken", "evidence", "train"), ("broken", "lock", "train")} <= found(audit(project))


def test_evidence_replayed_from_another_run(project: Path) -> None:
    before = evidence(project, "train")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("steps: 3", "steps: 4"))
    run("dvc", "repro", "-q", cwd=project)
    commit(project, "another run")
    assert audit(project).verdict == "OK"
    (now,) = set(before.parent.iterdir()) - {before}
    now.write_bytes(before.read_bytes())
    assert {("broken", kind, "train") for kind in ("lock", "params", "file")} <= found(audit(project))
    now.unlink()  # and instead of replaying it: what is there is of another run
    assert {("broken", kind, "train") for kind in ("evidence", "lock")} <= found(audit(project))


@pytest.mark.parametrize("kind", ["list", "link"])
def test_an_extra_file_or_a_link_in_the_export(project: Path, kind: str) -> None:
    extra = project / EXPORT / "extra.bin"
    if kind == "list":
        extra.write_bytes(b"")
    else:
        weights = project / EXPORT / "weights.bin"
        shutil.move(weights, project / "elsewhere.bin")
        weights.symlink_to(project / "elsewhere.bin")  # the same bytes, today
    assert ("broken", kind, "export") in found(audit(project))


def test_a_link_into_dvcs_cache_is_dvcs(project: Path) -> None:
    run("dvc", "config", "cache.type", "symlink", cwd=project)
    run("dvc", "checkout", "-q", "--relink", cwd=project)
    assert (project / MODEL).is_symlink()
    assert audit(project).findings == []


def test_a_link_into_a_cache_that_has_it_no_more_is_absent(project: Path) -> None:
    (project / METRIC).unlink()
    (project / METRIC).symlink_to(f"/nowhere/files/md5/aa/{'0' * 30}")
    report = audit(project)
    assert found(report) == {("unproven", "absent", "score")}
    assert report.exit_code == 3


@pytest.mark.parametrize(
    ("path", "stage", "kind"), [(METRIC, "score", "list"), (f"{EXPORT}/config.json", "export", "file")]
)
def test_what_is_no_file_in_a_files_place_is_broken(project: Path, path: str, stage: str, kind: str) -> None:
    (project / path).unlink()
    os.mkfifo(project / path)
    assert ("broken", kind, stage) in found(audit(project))


def test_params_that_are_no_yaml_are_broken(project: Path) -> None:
    (project / "params.yaml").write_text("profile: [mini\n")
    assert found(audit(project)) == {("broken", "params", "")}
    of_all = {("broken", "params", name) for name in ("draw", "train", "export", "score")}
    assert found(audit(project, profile="mini")) == of_all


@pytest.mark.parametrize("what", ["deep", "folder"])
def test_evidence_that_cannot_be_read_is_broken(project: Path, what: str) -> None:
    path = evidence(project, "train")
    path.unlink()
    if what == "deep":
        path.write_text("[" * 100_000)
    else:
        path.mkdir()
    report = audit(project)
    assert ("broken", "evidence", "train") in found(report)
    assert report.first_broken == "train"


def test_where_a_public_key_cannot_be_read_nobody_is_trusted(project: Path) -> None:
    (project / "keys" / "junk.pub").write_text("junk")
    report = audit(project)
    assert found(report) == {("unproven", "signature", "")}
    assert {stage.standing for stage in report.stages} == {"own"}


def test_evidence_of_runs_that_the_lock_does_not_tell_of_is_listed_and_deleted_alone(project: Path) -> None:
    told = evidence(project, "train")
    earlier = told.with_name("0123456789abcdef.json")
    shutil.copy(told, earlier)
    command = ("python", "-m", "tve_pipeline.cli", "lineage", "unused")
    assert run(*command, cwd=project).stdout.split() == [earlier.relative_to(project).as_posix()]
    assert earlier.exists()
    run(*command, "--delete", cwd=project)
    assert (told.exists(), earlier.exists()) == (True, False)
    assert run(*command, cwd=project).stdout == ""


def test_a_stage_that_the_graph_no_longer_has_is_listed_and_taken_out_of_the_lock_alone(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    graph, lock = project / "dvc.yaml", project / "dvc.lock"
    before = lock.read_text()
    document = yaml.safe_load(graph.read_text())
    last = in_order(load_lock(project))[-1]
    its_evidence = evidence(project, last)
    del document["stages"][last]
    graph.write_text(yaml.safe_dump(document))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = ("python", "-m", "tve_pipeline.cli", "--root", str(project), "lineage", "unused")
    listed = [f"dvc.lock: {last}", its_evidence.relative_to(project).as_posix()]
    assert run(*command, cwd=elsewhere).stdout.splitlines() == listed
    assert (lock.read_text(), its_evidence.exists()) == (before, True)
    assert run(*command, "--delete", cwd=elsewhere).stdout.splitlines() == listed
    left = yaml.safe_load(before)["stages"]
    del left[last]
    assert (load_lock(project), its_evidence.exists()) == (left, False)
    assert run(*command, cwd=elsewhere).stdout == ""


def test_without_its_graph_no_stage_is_of_the_past(project: Path) -> None:
    before = (project / "dvc.lock").read_text()
    (project / "dvc.yaml").unlink()
    command = [sys.executable, "-m", "tve_pipeline.cli", "lineage", "unused", "--delete"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected the stage graph, got no such file" in done.stderr
    assert (project / "dvc.lock").read_text() == before


def test_code_changed_since(project: Path) -> None:
    code = project / "mini" / "train.py"
    code.write_text(code.read_text() + "\n# another line\n")
    assert found(audit(project)) == {("broken", "code", "train")}


def test_the_lock_file_changed(project: Path) -> None:
    lock = project / "requirements.lock"
    lock.write_text(lock.read_text() + "\n")
    assert {each.kind for each in audit(project).findings} == {"environment"}


def test_a_stage_ran_with_other_packages_than_the_lock_file_has(project: Path) -> None:
    def change(statement: dict) -> None:
        statement["predicate"]["buildDefinition"]["internalParameters"]["environment"]["packages"]["torch"] = "1.0"

    rewrite(project, "train", change, signed=True)
    report = audit(project)
    assert found(report) == {("broken", "environment", "train")}
    assert "torch 1.0" in report.findings[0].message


def test_a_stage_that_read_other_bytes_than_the_one_before_it_wrote(project: Path) -> None:
    def change(statement: dict) -> None:
        statement["subject"][0]["digest"]["sha256"] = "0" * 64

    rewrite(project, "draw", change, signed=True)
    assert {("broken", "chain", "train"), ("broken", "file", "draw")} <= found(audit(project))


def test_what_is_absent_is_said_to_be_absent(project: Path) -> None:
    shutil.rmtree(project / "data")
    report = audit(project)
    assert found(report) == {("unproven", "absent", "draw"), ("unproven", "absent", "train")}
    assert report.exit_code == 3


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ('Path("data/mini/shards/1.tar").unlink()', "1.tar: .*that was deleted meanwhile"),
        ('Path("data/mini/shards/1.tar").write_text("other")', "1.tar: .*that was written meanwhile"),
        ('Path("data/mini/shards/9.tar").write_text("more")', "9.tar: .*that was written meanwhile"),
    ],
)
def test_a_stage_whose_input_changes_under_it_fails_and_leaves_no_evidence(project: Path, work: str, said: str) -> None:
    code = project / "mini" / "train.py"
    code.write_text(code.read_text().replace("    Path(", f"    {work}; Path(", 1))
    before = sorted((project / "evidence").rglob("*.json"))
    ended = run("dvc", "repro", "train", cwd=project, check=False)
    assert ended.returncode != 0
    assert re.search(said, ended.stdout + ended.stderr)
    assert sorted((project / "evidence").rglob("*.json")) == before


def test_a_clone_without_data_still_checks_what_is_signed(project: Path, tmp_path: Path) -> None:
    run("git", "clone", "-q", str(project), str(tmp_path / "clone"), cwd=tmp_path)
    assert {each.kind for each in audit(tmp_path / "clone").findings} == {"absent"}


def test_an_artifact_is_audited_with_what_is_behind_it_alone(project: Path) -> None:
    flip(project / METRIC)
    report = audit(project, [str(project / MODEL)])
    assert [stage.name for stage in report.stages] == ["draw", "train"]
    assert report.verdict == "OK"
    with pytest.raises(ValueError, match=r"nowhere\.bin: expected an output of a stage"):
        audit(project, [str(project / "nowhere.bin")])


def test_uncommitted_changes_of_a_run_are_in_its_evidence(project: Path) -> None:
    code = project / "mini" / "train.py"
    code.write_text(code.read_text() + "\n# not committed\n")
    run("dvc", "repro", "-q", cwd=project)
    report = audit(project)
    assert found(report) == {("note", "commit", "train")}
    assert report.exit_code == 0
    details = unseal((project / report.stages[1].evidence).read_bytes(), {}).statement["predicate"]["runDetails"]
    assert "# not committed" in base64.b64decode(details["byproducts"][0]["content"]).decode()


@pytest.mark.parametrize("where", [(), ("--temp",)], ids=["workspace", "temp"])
def test_an_experiment_of_dvcs_leaves_evidence_of_its_own(project: Path, where: tuple[str, ...]) -> None:
    run("dvc", "exp", "run", "-q", *where, "-S", "train.steps=5", "--name", "five", cwd=project)
    run("git", "checkout", "-q", "--", ".", cwd=project)
    run("dvc", "checkout", "-q", cwd=project)
    assert audit(project).verdict == "OK"
    ended = run("python", "-m", "tve_pipeline.cli", "lineage", "diff", "HEAD", "five", "--json", cwd=project)
    differences = [(each["kind"], each["stage"], each["name"]) for each in json.loads(ended.stdout)]
    assert ("params", "train", "train.steps") in differences
    assert [kind for kind, *_ in differences] == sorted((kind for kind, *_ in differences), key=_importance)
    run("dvc", "exp", "apply", "-q", "five", cwd=project)
    assert audit(project).verdict == "OK"


def _importance(kind: str) -> int:
    from tve_pipeline.lineage.diff import KINDS

    return KINDS.index(kind)


def test_the_private_key_is_0600_and_in_no_commit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Path(os.environ["XDG_CONFIG_HOME"]) / "tve" / "signing_key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    tracked = run("git", "grep", "-l", "PRIVATE KEY", cwd=project, check=False).stdout
    assert tracked == ""
    key_copy = project.parent / "open.pem"
    shutil.copy(key, key_copy)
    key_copy.chmod(0o644)
    monkeypatch.setenv("TVE_SIGNING_KEY", str(key_copy))
    with pytest.raises(ValueError, match="expected a private key with mode 0600, got 0644"):
        own_signer()


def test_the_command_says_what_broke_and_with_which_code(project: Path) -> None:
    audit_command = ("python", "-m", "tve_pipeline.cli", "audit")
    fine = run(*audit_command, cwd=project)
    assert fine.stdout.splitlines()[-1].startswith("OK: 4 stages (4 trusted)")
    flip(project / MODEL)
    broken = run(*audit_command, "--json", cwd=project, check=False)
    assert broken.returncode == 1
    document = json.loads(broken.stdout)
    assert (document["verdict"], document["first_broken"]) == ("BROKEN", "train")
    assert len(load_lock(project)) == len(document["stages"])
    assert run(*audit_command, "nowhere", cwd=project, check=False).returncode == 2


def test_the_audit_imports_neither_torch_nor_dvc(project: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tve_pipeline.lineage.audit import audit; audit(Path('.'));"
        "print({'torch', 'dvc', 'prefect'} & set(sys.modules))"
    )
    assert run("python", "-c", program, cwd=project).stdout.strip() == "set()"


def test_the_page_leads_from_a_number_to_the_shards_by_links(project: Path) -> None:
    text = page(audit(project))
    targets = {name: text.partition(f'<section id="{name}">')[2].partition("</section>")[0] for name in STAGES}
    assert f'<a href="#score"><code>{METRIC}</code></a>' in text
    for stage, before in itertools.pairwise(reversed(STAGES)):
        assert f'href="#{before}"' in targets[stage]
    assert records([project / SHARDS / "0.tar"], md5=False)[f"{project}/{SHARDS}/0.tar"].sha256 in targets["draw"]
    assert "<script" not in text
    flip(project / SHARDS / "0.tar")
    assert 'Broken since <a href="#draw">draw</a>' in page(audit(project))


def test_names_from_a_tree_do_not_become_markup(project: Path) -> None:
    (project / EXPORT / "<img src=x>").write_bytes(b"")
    assert "<img" not in page(audit(project))


def test_a_stage_from_dvcs_run_cache_has_the_evidence_of_that_run(project: Path) -> None:
    params, first = project / "params.yaml", evidence(project, "train")
    before = params.read_text()
    params.write_text(before.replace("steps: 3", "steps: 4"))
    run("dvc", "repro", "-q", cwd=project)
    assert len(list(first.parent.iterdir())) == 2
    params.write_text(before)
    assert "is cached - skipping run" in run("dvc", "repro", cwd=project).stdout
    report = audit(project)
    assert report.findings == []
    assert project / report.stages[1].evidence == first


def test_the_crate_describes_every_run_and_names_nothing_that_is_not_in_it(project: Path) -> None:
    document = crate(audit(project), "mini", "CC-BY-4.0")
    by_id = {each["@id"]: each for each in document["@graph"]}
    assert len(by_id) == len(document["@graph"])

    def references(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (str(each) for key, each in value.items() if key == "@id" and len(value) == 1)
            yield from (name for each in value.values() for name in references(each))
        elif isinstance(value, list):
            yield from (name for each in value for name in references(each))

    outside = {"http://schema.org/CompletedActionStatus", "https://dvc.org", "https://w3id.org/ro/crate/1.1"}
    assert set(references(document["@graph"])) - outside <= set(by_id)
    for stage, made in (("draw", f"{SHARDS}/0.tar"), ("train", MODEL), ("score", METRIC)):
        assert {"@id": made} in by_id[f"#run-{stage}"]["result"]
    assert by_id["./"]["license"] == {"@id": "https://spdx.org/licenses/CC-BY-4.0"}
    assert by_id[MODEL]["sha256"] == records([project / MODEL], md5=False)[str(project / MODEL)].sha256
