-- A position past everything that was committed in the window.
select multihome.close_window() as lsn
