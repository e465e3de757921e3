"""`complete-fn connections` registers the databases that a tenant's jobs may use."""

from __future__ import annotations

import argparse
from datetime import datetime

from complete_fn.cli.local_state import open_store, print_table
from complete_fn.cli.main import OK, Parser, add_home
from complete_fn.cli.terminal import print_out
from complete_fn.errors import InvalidOptionError
from complete_fn.jobs.connections import Connections

DESCRIPTION = """\
Register databases that a tenant's jobs may read, and with --writable write.

  CRM_URL=postgresql://reader:secret@host/crm complete-fn serve
  complete-fn connections add crm --tenant acme --url-env CRM_URL

Only the variable's name is kept; the service looks the URL up where it runs. Jobs read by one SELECT in a read-only
transaction with a time limit (COMPLETE_FN_SQL_SECONDS): still give them a role that sees only what it should."""


def main(argv: list[str]) -> int:
    parser = Parser(
        "complete-fn connections", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="add|list|remove", parser_class=Parser)
    add = verbs.add_parser("add", help="register a database for a tenant")
    add.add_argument("--url-env", required=True, metavar="VARIABLE", help="of the service's environment, with the URL")
    add.add_argument("--writable", action="store_true", help="jobs may write answers there")
    remove = verbs.add_parser("remove", help="no new job can use it")
    for each in (add, remove):
        each.add_argument("name", help="of the connection")
        each.add_argument("--tenant", required=True, help="whose jobs may use it ('local' where no API keys are)")
    verbs.add_parser("list", help="all connections, without their URLs")
    for each in verbs.choices.values():
        add_home(each)
    asked = parser.parse_args(argv)
    known = Connections(open_store(asked.home))
    if asked.verb == "add":
        known.add(asked.tenant, asked.name, asked.url_env, asked.writable)
        print_out(f"Jobs of {asked.tenant} may {'read and write' if asked.writable else 'read'} {asked.name}.")
    elif asked.verb == "remove":
        if not known.remove(asked.tenant, asked.name):
            raise InvalidOptionError(f"Tenant {asked.tenant} has no connection {asked.name!r}.")
        print_out(f"{asked.name} is removed.")
    else:
        lines = [
            (c.tenant, c.name, c.url_env, "read, write" if c.writable else "read", moment(c.created_at))
            for c in known.list()
        ]
        print_table([("TENANT", "NAME", "VARIABLE", "MAY", "CREATED"), *lines])
    return OK


def moment(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")
