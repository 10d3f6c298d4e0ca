"""Saves rows one after the other with psycopg, on one connection, until its standard input ends.

What it sees is one line each: `saved PORT ID`, `refused` (25006: this node is down now), `unreachable` (no node would do, or
the connection went). A row that was not acknowledged is sent again under the same key, so it cannot be there twice.
"""

import sys
import threading
import time
import uuid

import psycopg

PATIENCE = 30


def save(url, connection, cookie):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if connection is None:
                connection = psycopg.connect(url, autocommit=True, connect_timeout=2)
            connection.execute(
                "insert into stillebot.http_sessions (cookie) values (%s) on conflict do nothing", [cookie]
            )
            print("saved", connection.info.port, cookie, flush=True)
            return connection
        except psycopg.errors.ReadOnlySqlTransaction:
            print("refused", flush=True)
        except psycopg.OperationalError:
            print("unreachable", flush=True)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{cookie} could not be saved in {PATIENCE} s")
        # A new connection is what looks for the live node.
        if connection is not None:
            connection.close()
            connection = None
        time.sleep(0.05)


def main(url):
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    connection = None
    while not ended.is_set():
        connection = save(url, connection, str(uuid.uuid4()))
        time.sleep(0.01)


main(sys.argv[1])
