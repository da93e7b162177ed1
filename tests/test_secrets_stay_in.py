"""Secrets stay in: a text that looks like one never leaves the app."""

import random
import time
import timeit
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import app


def luhn_digit(digits: str) -> str:
    """The digit that makes the number a possible card number."""
    total = sum(sum(divmod(int(digit) * (2 - place % 2), 10)) for place, digit in enumerate(reversed(digits)))
    return str(-total % 10)


MIXED, HEX = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xY" * 3, "0123456789abcdef" * 8
# Put together here, so that nobody's scanner mistakes this file for a leak.
TOKENS = {
    "Bellhop API key": "bh_" + MIXED[:43],
    "webhook secret": "whsec_" + "C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
    "AWS key id": "AKIA" + "IOSFODNN7EXAMPLE",
    "AWS temporary key id": "ASIA" + "IOSFODNN7EXAMPLE",
    "AWS secret": "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "GitHub": "ghp" + "_" + MIXED[:36],
    "GitHub app": "ghs" + "_" + MIXED[:36],
    "GitHub fine-grained": "github" + "_pat_" + MIXED[:22] + "_" + MIXED[:59],
    "GitLab": "glpat" + "-" + MIXED[:20],
    "GitLab runner": "glrt" + "-" + MIXED[:20],
    "Slack bot": "xox" + "b-1234567890-1234567890123-" + MIXED[:24],
    "Slack app": "xapp" + "-1-A0123456789-1234567890123-" + HEX[:64],
    "Slack webhook": "https://hooks.slack.com/" + "services/T00000000/B00000000/" + MIXED[:24],
    "Discord webhook": "https://discord.com/api/" + "webhooks/123456789012345678/" + MIXED[:68],
    "Telegram": "1234567890:AA" + MIXED[:33],
    "Stripe": "sk" + "_live_" + MIXED[:24],
    "Stripe restricted": "rk" + "_test_" + MIXED[:24],
    "Google": "AIza" + MIXED[:35],
    "Google OAuth": "ya29." + "a0AfH6SM" + MIXED[:60],
    "Google client": "GOCSPX" + "-" + MIXED[:28],
    "OpenAI": "sk" + "-" + MIXED[:48],
    "OpenAI project": "sk-" + "proj-" + MIXED[:48],
    "Anthropic": "sk-" + "ant-api03-" + MIXED[:90],
    "Hugging Face": "hf" + "_" + MIXED[:34],
    "DigitalOcean": "dop_v1" + "_" + HEX[:64],
    "Shopify": "shpat" + "_" + HEX[:32],
    "Square": "sq0csp" + "-" + MIXED[:43],
    "Docker": "dckr" + "_pat_" + MIXED[:27],
    "Figma": "figd" + "_" + MIXED[:40],
    "Linear": "lin_api" + "_" + MIXED[:40],
    "Atlassian": "ATATT3" + "xFfGF0" + MIXED[:60],
    "Notion": "ntn" + "_" + MIXED[:46],
    "Notion of before": "secret" + "_" + MIXED[:43],
    "Groq": "gsk" + "_" + MIXED[:52],
    "xAI": "xai" + "-" + MIXED[:80],
    "Replicate": "r8" + "_" + MIXED[:37],
    "DeepSeek": "sk" + "-" + HEX[:32],
    "OpenRouter": "sk-" + "or-v1-" + HEX[:64],
    "Langfuse": "sk-" + "lf-" + "1234abcd-12ab-34cd-56ef-1234567890ab",
    "without capitals": "sk" + "-" + "1234567890abcdefghijkl",
    "GitLab workspace": "glwt" + "-" + MIXED[:20],
    "Vault": "hvs" + ".CAESI" + MIXED[:90],
    "Databricks": "dapi" + HEX[:32],
    "Mailgun": "key" + "-" + HEX[:32],
    "Doppler": "dp.pt" + "." + MIXED[:43],
    "New Relic": "NRAK" + "-" + MIXED.upper()[:27],
    "Sentry": "sntrys" + "_" + MIXED[:60],
    "GitLab runner of before": "GR1348941" + MIXED[:20],
    "Discord bot": "MTk4NjIyNDgzNDcxOTI1MjQ4" + ".Cl2FMQ." + "ZnCjm1XVW7vRze4b7Cq4se7kKWs",
    "PayPal": "access_token" + "$production$" + MIXED[:16] + "$" + HEX[:32],
    "age": "AGE-SECRET-KEY" + "-1" + MIXED.upper()[:58],
    "npm": "npm" + "_" + MIXED[:36],
    "PyPI": "pypi" + "-AgEIcHlwaS5vcmc" + MIXED[:60],
    "SendGrid": "SG" + "." + MIXED[:22] + "." + MIXED[:43],
    "Twilio": "SK" + HEX[:32],
    "Twilio account": "AC" + HEX[:32],
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0." + MIXED[:43],
    "unsigned JSON Web Token": "eyJhbGciOiJub25lIn0" + ".eyJzdWIiOiIxMjM0In0.",
    "Bearer": "Authorization: Bearer " + MIXED[:24],
    "bearer of letters": "bearer abcdefghijklmnopqrstuvwxyz",
    "Basic": "Authorization: Basic " + "dXNlcjpwYXNzd29yZDEyMw==",
    "private key": "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA",
    "OpenSSH key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "database URL": "postgresql://admin:" + "hunter2@db.example.org/app",
    "an API key": "api_key=" + MIXED[:20],
    "an API key in JSON": '{"apiKey": "' + MIXED[:32] + '"}',
    "a client secret": "client_secret: " + MIXED[:32],
    "a reset link": "https://example.org/reset?token=" + MIXED[:32],
    "a password": "password=" + "correct4Horse!Battery",
}
CARDS = [
    "4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "4222222222222", "5555555555554444",
    "5105 1051 0510 5100", "2223003122003222", "378282246310005", "3782 822463 10005", "371449635398431",
    "6011111111111117", "6011 0009 9013 9424", "3530111333300000", "30569309025904", "3852 0000 0232 37",
    "6240008631401148", "4000 0000 0000 0002", "4444333322221111455", "5200 8282 8282 8210 12/27 123",
    "4111 1111 1111 1111 123", "4111\u00a01111\u00a01111\u00a01111",
    "4111.1111.1111.1111", "4111_1111_1111_1111", "4111  1111  1111  1111", "4111\u20111111\u20111111\u20111111",
    "4111\u20131111\u20131111\u20131111", "12/27 4111111111111111 123", "12/27 4111 1111 1111 1111",
]  # fmt: skip
PUBLIC = [
    "Order 1000234987 has shipped", "Order #4539148803436468 has shipped", "Bestellung 2024-0012-7781-9934",
    "Call +49 30 901820 or +1 (555) 010-9999", "Call +49 170 1234567 8901234", "0049 30 1234 5678 9012 34",
    "Ticket 550e8400-e29b-41d4-a716-446655440000 was closed", "12345678-1234-4234-8234-123456789012",
    "0190a000-0000-7000-8000-000000000001", "Commit a94a8fe5ccb19ba61c4c0873d391e987982fbbd3 broke the build",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "d41d8cd98f00b204e9800998ecf8427e", "Meeting 2026-03-04T12:00:00+01:00 to 2026-03-04T13:30:00+01:00",
    "2026-03-04 12:00 2026-03-05 13:00", "DE89 3704 0044 0532 0130 00", "DE89370400440532013000",
    "GB29 NWBK 6016 1331 9268 19", "FR76 3000 6000 0112 3456 7890 189", "NL91ABNA0417164300",
    "Release v10.4.2-rc.1+build.20240101.1234", "Python 3.11.7, PostgreSQL 15.18 (Debian 15.18-0+deb12u1)",
    "https://github.com/acme/shop/commit/a94a8fe5ccb19ba61c4c0873d391e987982fbbd3",
    "https://example.org/orders/4111111111111111",
    "https://example.org/u/1790234987123456789/posts?page=2&sort=created_at",
    "https://example.org:8443/a@b/c", "Unix time 1700000000000", "IMEI 490154203237518",
    "ISBN 978-3-16-148410-0", "EAN 4006381333931 is out of stock", "Tracking 1Z999AA10123456784",
    "Tracking 00340434161094042557", "Invoice INV-2024-000123456789", "Pi is 3.14159265358979323846",
    "Parcel LX123456789DE", "192.168.100.200 is down", "fe80:0000:0000:0000:0202:b3ff:fe1e:8329 is down",
    "aa:bb:cc:dd:ee:ff", "The token of the session has expired", "Secret Santa: your partner is chosen",
    "Password reset requested", "Your password: please change it", "Bearer of bad news",
    "The bearer responsibly declined", "Basic understanding-of-things", "basic internationalization",
    "task-management-board-reorganised", "sk-learn-pipeline-integration-tests",
    "glances-of-world-history-2026 is out", "sk-ii-facial-treatment-essence-230ml has shipped",
    "pypi-publish-workflow-run-for-the-main-branch-finished", "npm_config_registry_changed_to_internal_mirror",
    "gsk_glaxosmithkline_quarterly_report_2026_final_draft", "r8_retro_board_of_the_platform_team_week_47",
    "hvs.production-cluster-eu-west-2026", "secret_rotation_for_the_payments_service_q3_2026_done",
    "xai-explainability-workshop-2026-agenda-and-list-of-speakers", "sk-team-2026-planning-of-the-next-half-year",
    "NotificationPreferences.Update.finished-on-the-main-cluster",
    "Newsletter-of-this-summer.second.edition-for-all-our-customers", "cache-key-d41d8cd98f00b204e9800998ecf8427e is stale",
    "secret_santa_of_the_whole_marketing_department_on_friday",
    "risk-assessment-2024-revised-edition-3", "sk_SK.UTF-8 locale missing", "bh_deploy_job failed",
    "npm_config_cache is full", "Merge branch 'feature/very-long-branch-name-2024'",
    "ERR_CONNECTION_REFUSED_BY_UPSTREAM_HOST_12", "kubernetes.io/ingress.class=nginx",
    "com.example.notifications.DeliveryWorker42", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "0.4111111111111111",
    "100,000,000,000,000", "4.111.111.111.111.111", "Build 2026.1122.0408.1111", "4111.1111.1111.1111.2",
    "Rows 11/22 of 4111111111111112", "", " ", "ok", "प्रतिवेदन तैयार है", "새 알림이 있습니다",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS.keys())
def test_a_token_is_found_wherever_it_stands(token: str) -> None:
    for text in (
        token,
        f"Deployed with {token}",
        f"{token} expires",
        f"({token})",
        f"key: {token}.",
        f"new\n{token}\n",
    ):
        assert app.looks_secret(text), text


@pytest.mark.parametrize("card", CARDS)
def test_a_card_number_is_found_wherever_it_stands(card: str) -> None:
    for text in (card, f"Card {card} was charged", f"card:{card}", f"({card})", f"4711: {card}", f"#{card}."):
        assert app.looks_secret(text), text


@pytest.mark.parametrize("text", PUBLIC)
def test_an_ordinary_text_stays_public(text: str) -> None:
    assert not app.looks_secret(text)


def test_a_number_that_fails_the_check_is_no_card() -> None:
    for card in CARDS:
        digits = "".join(character for character in card.partition(" 12/")[0] if character.isdigit())[:16]
        for wrong in range(1, 10):
            last = str((int(luhn_digit(digits[:-1])) + wrong) % 10)
            assert not app.looks_secret(f"Order {digits[:-1]}{last}"), digits


def test_ids_are_hardly_ever_taken_for_cards() -> None:
    chance = random.Random(7)
    uuids = [f"{chance.getrandbits(128):032x}" for _ in range(20_000)]
    texts = [f"Job {u[:8]}-{u[8:12]}-{u[12:16]}-{u[16:20]}-{u[20:]}" for u in uuids]
    assert sum(map(app.looks_secret, texts)) == 0
    assert sum(map(app.looks_secret, (f"Commit {u}{u[:8]}" for u in uuids))) == 0


@given(st.text(max_size=300))
def test_no_text_is_too_strange(text: str) -> None:
    assert app.looks_secret(text) in (True, False)


LONG = [
    "9", "4 ", "a", "eyJ", "a:", "a://", "token", "secret_key-", "-", "SG.", "Bearer ",
    "4111 1111 1111 1112 ", "x=", "basic a", "sk-", "-----", "4-", "ab12-",
]  # fmt: skip


def seconds(do: Callable[[], Any], times: int = 1) -> float:
    """The CPU time of one call at its best: what others do on the machine is not in it."""
    return min(timeit.repeat(do, number=times, repeat=5, timer=time.thread_time)) / times


@pytest.mark.parametrize("part", LONG)
def test_no_text_takes_long(part: str) -> None:
    short, long = (part * (size // len(part)) for size in (2_000, 16_000))
    ratio = seconds(lambda: app.looks_secret(long)) / seconds(lambda: app.looks_secret(short))
    assert ratio < 24, "eight times the text takes about eight times as long, not its square"


def test_an_ordinary_title_costs_next_to_nothing() -> None:
    title = "Build 4821 of the checkout service failed on branch main now"
    assert len(title) == 60
    guard, id_alone = seconds(lambda: app.looks_secret(title), 2000), seconds(app.new_id, 2000)
    assert guard < 4 * id_alone, f"{guard / id_alone:.1f} of what it takes to make an id"  # measured: 1
