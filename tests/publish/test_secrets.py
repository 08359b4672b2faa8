"""No secret gets out: each kind is found in each of its spellings, and is never repeated; what only looks like one is
let through."""

import json

import pytest

from lora_merge.publish.secrets import find_paths, find_secrets

# Put together here, so that no scanner of this repository takes them for real ones.
LETTERS = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dF3hJ5kL7n"
SECRETS = {
    "hf_" + LETTERS[:34]: "a Hugging Face token",
    "api_org_" + LETTERS[:34]: "a Hugging Face token",
    "AKIA" + "IOSFODNN7EXAMPLE": "an AWS access key",
    "aws_secret_access_key = " + LETTERS[:40]: "an AWS secret key",
    "AIza" + LETTERS[:35]: "a Google API key",
    "GOCSPX-" + LETTERS[:28]: "a Google OAuth secret",
    "AccountKey=" + LETTERS + LETTERS + "==": "an Azure storage key",
    "ghp_" + LETTERS[:36]: "a GitHub token",
    "github_pat_" + LETTERS[:30]: "a GitHub token",
    "glpat-" + LETTERS[:20]: "a GitLab token",
    "sk-" + LETTERS[:32]: "an API key of the form sk-…",
    "sk-proj-" + LETTERS[:32]: "an API key of the form sk-…",
    "sk-ant-" + "api03-" + LETTERS[:32]: "an API key of the form sk-…",
    "sk_live_" + LETTERS[:24]: "a Stripe key",
    "xoxb-" + "123456789012-" + LETTERS[:24]: "a Slack token",
    "xapp-" + "1-A01-1234567890-" + LETTERS[:24]: "a Slack token",
    "npm_" + LETTERS[:36]: "an npm token",
    "pypi-" + LETTERS + LETTERS: "a PyPI token",
    "-----BEGIN " + "PRIVATE KEY-----": "a private key",
    "-----BEGIN " + "OPENSSH PRIVATE KEY-----": "a private key",
    "-----BEGIN " + "RSA PRIVATE KEY-----": "a private key",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.abc-_": "a JSON web token",
    "Authorization: Bearer " + LETTERS[:20]: "an authorization header",
    "https://me:" + "hunter2@example.org/x": "a password in an address",
    "redis://:" + "hunter2@example.org/0": "a password in an address",
    "https://" + LETTERS[:24] + "@example.org/x": "a token in an address",
    "git+https://" + LETTERS[:24] + ":@example.org/x": "a token in an address",
    "/home" + "/me/adapters": "a path of a home folder",
    "//home" + "/me": "a path of a home folder",
    "PYTHONPATH=/usr/lib:/home" + "/me/src": "a path of a home folder",
    "me@host:/Users" + "/me/x": "a path of a home folder",
    "host:/root" + "/x": "a path of a home folder",
    "-I/home" + "/me/inc": "a path of a home folder",
    "sqlite:////home" + "/me/x.db": "a path of a home folder",
    "file://localhost/home" + "/me": "a path of a home folder",
    "/Users" + "/me/adapters": "a path of a home folder",
    "/var/home" + "/me/adapters": "a path of a home folder",
    "/mnt/c/Users" + "/me/adapters": "a path of a home folder",
    "file:///home" + "/me/adapters": "a path of a home folder",
    "/root" + "/adapters": "a path of a home folder",
    "C:\\Users" + "\\me\\adapters": "a path of a Windows home folder",
    "d:/users" + "/me/adapters": "a path of a Windows home folder",
    "\\\\srv\\Users" + "\\me": "a path of a Windows home folder",
    "\\\\srv\\c$\\Users" + "\\me": "a path of a Windows home folder",
}
HARMLESS = [
    "org/home/x",
    "https://example.org/home/page",
    "https://example.org/Users/guide",
    "https://example.org:8080/home/page",
    "https://example.org//home/page",
    "https://home/page",
    "https://root/page",
    "//example.org/home/page",
    "ssh://git@example.org/home/page",
    "ssh://git@github.com/org/model",
    "https://a-long-name-without-any-number@example.org/x",
    "https://example.org/@someone-with-1-long-name/x",
    "./home/page",
    "docs/home/page",
    "\\alpha\\beta",
    "model.layers.0.self_attn.q_proj",
    "risk-" + LETTERS[:32],
    "task-1-of-the-long-list-of-tasks-2",
    "a" * 64,
    "0123456789abcdef" * 4,
    "hf_hub",
    "sk-learn-like-interface",
    "-----BEGIN SSH SIGNATURE-----",
    "-----BEGIN PUBLIC KEY-----",
    "https://huggingface.co/org/model",
    "someone@example.org",
    "a home folder: ~/x",
]


@pytest.mark.parametrize(("secret", "kind"), SECRETS.items(), ids=lambda value: value[:12])
@pytest.mark.parametrize("form", ["{}", "a: {}\n", '"{}"', "({})", "see `{}`.", "{},next"])
def test_each_kind_is_found_wherever_it_stands(secret: str, kind: str, form: str) -> None:
    assert kind in {found.kind for found in find_secrets("first line\n" + form.format(secret))}


@pytest.mark.parametrize(("secret", "kind"), SECRETS.items(), ids=lambda value: value[:12])
def test_json_hides_nothing(secret: str, kind: str) -> None:
    escaped = "".join(f"\\u{ord(char):04x}" for char in secret)
    for text in (
        json.dumps({"a": [{"b": secret}]}),
        json.dumps({secret: 1}),
        f'{{"a": "{escaped}"}}',
        json.dumps({"a": secret}).replace("/", "\\/"),
    ):
        assert kind in {found.kind for found in find_secrets(text)}, text


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_secret_is_let_through(text: str) -> None:
    assert find_secrets(text) == []


WITHIN = [
    "/scratch/alice/rows.jsonl",
    "/mnt/nas2/rows.jsonl",
    "/data3/alice",
    "//data//alice",
    "/Volumes/Backup/rows",
    "/var/lib/rows",
    "file:///srv/rows",
    "file:/rows",
    "file://host/rows",
    "nas:/export/rows",
    "D:\\rows\\of mine\\a.jsonl",
    "D:/rows/a.jsonl",
    "-I/opt/alice",
    "--data=/work/rows.jsonl",
]


@pytest.mark.parametrize("path", WITHIN)
@pytest.mark.parametrize("form", ["{}", "trained at {} on Tuesday", "see `{}`.", "({})", "one https://a.org/b\n{}"])
def test_a_path_of_a_machine_is_found_within_a_text_of_json(path: str, form: str) -> None:
    text = form.format(path)
    assert find_paths(json.dumps({"a": [{"notes": text}, 1]})) == ["a.0.notes"]
    assert find_paths(json.dumps({"a": {text: 1}})) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        *HARMLESS,
        "and/or",
        "org/data/x",
        "./data/rows.jsonl and ../data/rows.jsonl",
        "data/rows.jsonl",
        "https://example.org/data/rows.jsonl?from=/data/x",
        "https://data/x and s3://bucket/data/x and hf://datasets/org/data/x",
        "example.org:8080/data/x",
        "[the model](https://huggingface.co/org/model/tree/main/data)",
        "POST /v1/chat/completions",
        "#!/usr/bin/env python",
        "sent to /dev/null",
        "either /data or /tmp",
        "3/4 /5",
        "Q:\\nA:\\n",
        "ratio a:/b",
        "<|im_start|>user/<|im_end|>",
        "s/data/x/g",
    ],
)
def test_what_only_looks_like_a_path_is_let_through_within_a_text(text: str) -> None:
    assert find_paths(json.dumps({"notes": f"it says {text} here"})) == []


def test_the_line_is_named_and_the_secret_is_not() -> None:
    secret = "hf_" + LETTERS[:34]
    [found] = find_secrets(f"one\ntwo\nthree {secret}")
    assert found.line == 3
    assert secret not in repr(found)


def test_what_is_known_to_be_secret_needs_no_form() -> None:
    [found] = find_secrets("a\nthe moon is 7", {"your Hub token": "moon is 7"})
    assert (found.line, found.kind) == (2, "your Hub token")


@pytest.mark.parametrize("unit", ["/a", "/-a", ":/a", "\\\\a", "a:\\a", "/data", "aws", "sk-", "eyJ", "a://b"])
def test_no_text_makes_the_scan_slow(unit: str) -> None:
    import time

    started = time.process_time()
    find_secrets(unit * 50_000)
    find_paths(json.dumps({"a": f"at {unit * 50_000}"}))
    assert time.process_time() - started < 2
