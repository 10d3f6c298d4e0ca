-- The application's tables as its two databases have them, with the triggers through which every running bot hears of a
-- change whichever side made it: ENABLE ALWAYS, so that they also fire for rows that replication brings.

create schema stillebot;

create table stillebot.commands (
    id uuid primary key default gen_random_uuid(),
    twitchid bigint not null,
    cmdname text not null,
    active boolean not null,
    content jsonb not null,
    created timestamptz not null default now()
);
create unique index commands_active on stillebot.commands (twitchid, cmdname) where active;

create table stillebot.config (
    twitchid bigint not null,
    keyword varchar not null,
    data jsonb not null,
    primary key (twitchid, keyword)
);

create table stillebot.config_exportable (
    keyword varchar primary key
);

create table stillebot.settings (
    asterisk char primary key default '*' check (asterisk = '*'),
    active_bot varchar,
    credentials jsonb not null default '{}'
);

create table stillebot.http_sessions (
    cookie varchar primary key,
    active timestamptz not null default now(),
    data bytea not null default ''
);

create table stillebot.raids (
    fromid bigint not null,
    toid bigint not null,
    data jsonb not null default '[]',
    primary key (fromid, toid)
);

create table stillebot.uploads (
    id uuid primary key default gen_random_uuid(),
    channel bigint not null,
    uploader bigint not null,
    metadata jsonb not null default '{}',
    expires timestamptz,
    data bytea not null default ''
);

create table stillebot.botservice (
    twitchid bigint primary key,
    deactivated timestamptz,
    login text not null,
    display_name text not null
);

create table stillebot.user_login_sightings (
    twitchid bigint not null,
    login text not null,
    bot text not null,
    sighted timestamptz not null default now(),
    primary key (twitchid, login, bot)
);

create function stillebot.tell_commands() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        perform pg_notify('stillebot.commands', old.twitchid || ':' || old.cmdname);
    else
        perform pg_notify('stillebot.commands', new.twitchid || ':' || new.cmdname);
    end if;
    return null;
end $$;
create trigger tell_commands after insert or update or delete on stillebot.commands
    for each row execute function stillebot.tell_commands();
alter table stillebot.commands enable always trigger tell_commands;

create function stillebot.tell_config() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        perform pg_notify('stillebot.config:' || old.keyword, old.twitchid::text);
    else
        perform pg_notify('stillebot.config:' || new.keyword, new.twitchid::text);
    end if;
    return null;
end $$;
create trigger tell_config after insert or update or delete on stillebot.config
    for each row execute function stillebot.tell_config();
alter table stillebot.config enable always trigger tell_config;

create function stillebot.tell_settings() returns trigger language plpgsql as $$
begin
    perform pg_notify('stillebot.settings', '');
    return null;
end $$;
create trigger tell_settings after insert or update or delete on stillebot.settings
    for each row execute function stillebot.tell_settings();
alter table stillebot.settings enable always trigger tell_settings;

create function stillebot.tell_http_sessions() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        perform pg_notify('stillebot.http_sessions', old.cookie);
    else
        perform pg_notify('stillebot.http_sessions', new.cookie);
    end if;
    return null;
end $$;
create trigger tell_http_sessions after insert or update or delete on stillebot.http_sessions
    for each row execute function stillebot.tell_http_sessions();
alter table stillebot.http_sessions enable always trigger tell_http_sessions;

create function stillebot.tell_uploads() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        perform pg_notify('stillebot.uploads', old.channel || '-' || old.id);
    else
        perform pg_notify('stillebot.uploads', new.channel || '-' || new.id);
    end if;
    return null;
end $$;
create trigger tell_uploads after insert or update or delete on stillebot.uploads
    for each row execute function stillebot.tell_uploads();
alter table stillebot.uploads enable always trigger tell_uploads;

create function stillebot.tell_botservice() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        perform pg_notify('stillebot.botservice', old.twitchid::text);
    else
        perform pg_notify('stillebot.botservice', new.twitchid::text);
    end if;
    return null;
end $$;
create trigger tell_botservice after insert or update or delete on stillebot.botservice
    for each row execute function stillebot.tell_botservice();
alter table stillebot.botservice enable always trigger tell_botservice;
