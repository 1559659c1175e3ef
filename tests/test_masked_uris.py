"""No password is printed or written, whoever's message it stands in."""

from __future__ import annotations

import pickle

import pytest

from prunezero.errors import OutputError, PruneZeroError, masked_uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://alice:s3cret@127.0.0.1:9", "https://***@127.0.0.1:9"),
        ("https://s3cret@host/path", "https://***@host/path"),
        ("postgresql+psycopg2://u:s3cret@db:5432/x", "postgresql+psycopg2://***@db:5432/x"),
        ("mysql://u:s3cr%40et@db/x?ssl=1", "mysql://***@db/x?ssl=1"),
        ("mysql://u:s3c@ret@db/x", "mysql://***@db/x"),
        ("mysql://u:s3c/ret@db/x", "mysql://***@db/x"),
        ("mysql://u:s3c/r@et@db/x", "mysql://***@db/x"),
        ("mysql://u:s3c'ret@db/x", "mysql://***@db/x"),
        ("HTTPS://U:s3cret@h", "HTTPS://***@h"),
        ("https://:s3cret@[::1]:9/x", "https://***@[::1]:9/x"),
        ("https://h/x?a=1&token=s3cret&b=2", "https://h/x?a=1&token=***&b=2"),
        ("https://h/x?X-Amz-Signature=s3cret", "https://h/x?X-Amz-Signature=***"),
        ("postgresql://h/d?user=s3cret&password=s3cret", "postgresql://h/d?user=***&password=***"),
        ("https://h/#access_token=s3cret", "https://h/#access_token=***"),
        ("https://h/x?api_key=s3cret;apikey=s3cret", "https://h/x?api_key=***;apikey=***"),
        (
            "https://h/?to=https%3A%2F%2Fu%3As3cret%40h%3A9&b=2",
            "https://h/?to=https%3A%2F%2F***%40h%3A9&b=2",
        ),
        ("a http://u:s3cret@h, b ftp://v:s3cret@g.", "a http://***@h, b ftp://***@g."),
        ("http://u:s3cret@h;http://v:s3cret@g", "http://***@h;http://***@g"),
        ("('http://u:s3cret@h:9/x')", "('http://***@h:9/x')"),
        ("postgresql://h/d?sslpassword=s3cret&a=1", "postgresql://h/d?sslpassword=***&a=1"),
        ("https://h/?SharedAccessKey=s3cret;a=1", "https://h/?SharedAccessKey=***;a=1"),
        (
            "mssql+pyodbc:///?odbc_connect=SERVER%3Dh%3BPWD%3Ds3c%20ret%3BEncrypt%3Dyes&a=1",
            "mssql+pyodbc:///?odbc_connect=SERVER%3Dh%3BPWD%3D***%3BEncrypt%3Dyes&a=1",
        ),
        ("{'password': 's3cret', 'a': 1}", "{'password': '***', 'a': 1}"),
        ("MLFLOW_TRACKING_PASSWORD=s3cret", "MLFLOW_TRACKING_PASSWORD=***"),
        ("host=h password=s3cret dbname=x", "host=h password=*** dbname=x"),
    ],
)
def test_whatever_tells_who_somebody_is_becomes_stars(text: str, shown: str) -> None:
    assert masked_uri(text) == shown
    assert masked_uri(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me@work/runs/mlflow.db",
        "http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=a&compareRunsMode=CHART",
        "https://host:8080/a@b",
        "write to me@host, or see https://host/x?split=train",
        "W**2 @ X, 2:4, a token=3",
        "",
    ],
)
def test_a_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert masked_uri(text) == text


def test_an_error_never_holds_a_password_however_it_travels() -> None:
    error = OutputError("the server https://alice:s3cret@h is away")
    assert str(error) == "the server https://***@h is away"
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, PruneZeroError) and str(again) == str(error)
