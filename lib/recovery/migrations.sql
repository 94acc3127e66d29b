-- The tables of genie.db, as the steps that make them. A step that was released is never changed:
-- a new one is added at the end, and `PRAGMA user_version` counts how many a file has had.

-- STEP 1

-- Attachments, the per-container locks, and the containers that ended.
CREATE TABLE attachments (
  container_id TEXT NOT NULL,
  request_ifname TEXT NOT NULL,
  ifname TEXT NOT NULL,
  position INTEGER NOT NULL,
  network TEXT NOT NULL,
  request_network TEXT NOT NULL,
  state TEXT NOT NULL,
  plan TEXT NOT NULL,
  result TEXT,
  netns_id TEXT NOT NULL,
  created_at_ms INTEGER NOT NULL,
  failed_at_ms INTEGER NOT NULL DEFAULT 0,
  error TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (container_id, ifname)
) STRICT;
CREATE TABLE operations (
  container_id TEXT PRIMARY KEY,
  command TEXT NOT NULL,
  pid INTEGER NOT NULL,
  started TEXT NOT NULL,
  boot_id TEXT NOT NULL,
  pid_namespace TEXT NOT NULL,
  token TEXT NOT NULL,
  at_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE ended (
  container_id TEXT NOT NULL,
  request_ifname TEXT NOT NULL,
  command TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (container_id, request_ifname)
) STRICT, WITHOUT ROWID;
CREATE INDEX ended_at ON ended (at_ms);

-- STEP 2

-- Status annotations that wait for the node agent.
CREATE TABLE statuses (
  container_id TEXT NOT NULL,
  request_ifname TEXT NOT NULL,
  pod_namespace TEXT NOT NULL,
  pod_name TEXT NOT NULL,
  pod_uid TEXT NOT NULL,
  annotations TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (container_id, request_ifname)
) STRICT, WITHOUT ROWID;

-- The audit ledger and the counters behind the bandwidth KPI, see `ledger.ts` and `kpi.ts`.
CREATE TABLE ledger (
  id INTEGER PRIMARY KEY,
  at_ms INTEGER NOT NULL,
  kind TEXT NOT NULL,
  command TEXT NOT NULL,
  container_id TEXT NOT NULL,
  pod_namespace TEXT NOT NULL,
  pod_name TEXT NOT NULL,
  pod_uid TEXT NOT NULL,
  network TEXT NOT NULL,
  plugin TEXT NOT NULL,
  ifname TEXT NOT NULL,
  duration_us INTEGER NOT NULL,
  outcome TEXT NOT NULL,
  code INTEGER NOT NULL,
  error TEXT NOT NULL,
  addresses TEXT NOT NULL,
  config_hash TEXT NOT NULL,
  decided_by TEXT NOT NULL,
  rule TEXT NOT NULL,
  choice TEXT NOT NULL
) STRICT;
CREATE INDEX ledger_network ON ledger (network, id, at_ms, duration_us, outcome)
  WHERE kind = 'network' AND command = 'ADD';
CREATE INDEX ledger_at ON ledger (at_ms);
CREATE TABLE traffic (
  container_id TEXT NOT NULL,
  ifname TEXT NOT NULL,
  network TEXT NOT NULL,
  host_ifname TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  bytes_per_second REAL,
  PRIMARY KEY (container_id, ifname)
) STRICT, WITHOUT ROWID;

-- What automatic choice remembers: who chose what of late, which networks said no, full stores.
CREATE TABLE choices (
  container_id TEXT PRIMARY KEY,
  network TEXT NOT NULL,
  at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE stores (
  dir TEXT PRIMARY KEY,
  stamp TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  ipv4 INTEGER NOT NULL,
  ipv6 INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE health (
  network TEXT PRIMARY KEY,
  config_hash TEXT NOT NULL,
  error TEXT NOT NULL,
  at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX attachments_network ON attachments (network, state);
CREATE INDEX traffic_network ON traffic (network, at_ms, bytes_per_second);
CREATE INDEX traffic_at ON traffic (at_ms);

-- STEP 3

-- Network policy: what it is decided on, as the node agent keeps it fresh; the ruleset of each
-- network namespace, written before it is in force; what is wrong with policies.
CREATE TABLE policy_inputs (
  resource TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  object TEXT NOT NULL,
  PRIMARY KEY (resource, namespace, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE policy_watches (
  resource TEXT PRIMARY KEY,
  alive_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE rulesets (
  netns_id TEXT PRIMARY KEY,
  container_id TEXT NOT NULL,
  pod_namespace TEXT NOT NULL,
  pod_name TEXT NOT NULL,
  ruleset TEXT NOT NULL,
  at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE policy_problems (
  kind TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  path TEXT NOT NULL,
  problem TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (kind, namespace, name, path, problem)
) STRICT, WITHOUT ROWID;

-- STEP 4

-- Rules at the node's end of a pod's interfaces, `policy.where`.
ALTER TABLE rulesets ADD COLUMN host_ruleset TEXT NOT NULL DEFAULT '';

-- STEP 5

-- Which selection of a pod the node agent has followed last, as a hash; "" where the operator
-- changed its networks before the agent ever saw it.
CREATE TABLE followed (
  container_id TEXT NOT NULL,
  request_ifname TEXT NOT NULL,
  selection TEXT NOT NULL,
  at_ms INTEGER NOT NULL,
  PRIMARY KEY (container_id, request_ifname)
) STRICT, WITHOUT ROWID;
