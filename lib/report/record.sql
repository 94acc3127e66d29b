-- What reports and the agent ask the record. Each query stands below its name, with an empty line
-- behind it.

-- span
-- One query each: only then does SQLite take the ends of the index.
SELECT (SELECT min(at_ms) FROM ledger) AS firstMs, (SELECT max(at_ms) FROM ledger) AS lastMs

-- requests
SELECT id, at_ms AS atMs, CASE kind WHEN 'call' THEN '' ELSE network END AS network,
  command = 'ADD' AS isAdd, command = 'DEL' AS isDel, duration_us AS durationUs, outcome, code,
  decided_by AS decidedBy, choice <> '' AS isChoice, kind = 'network' AS isRequest,
  CASE outcome WHEN 'ok' THEN NULL ELSE container_id || ' ' || command END AS call
FROM ledger
WHERE (kind = 'network' OR (kind = 'call' AND (outcome <> 'ok' OR choice <> '')))
  AND {{part}}
ORDER BY id

-- pods
-- A sandbox that fails is made anew for the same pod, with an id of its own.
SELECT count(*) AS pods, total(failed) AS failedPods
FROM (SELECT max(outcome <> 'ok') AS failed FROM ledger
  WHERE (kind = 'network' OR (kind = 'call' AND outcome <> 'ok')) AND container_id <> ''
    AND {{part}}
  GROUP BY pod_namespace, pod_name, pod_uid, CASE pod_name WHEN '' THEN container_id END)

-- failures
-- Of a call that failed in a network the row of that network stands for it: rows of one call have
-- one time. Messages of plugins may name the container, and that is a new one each time.
SELECT max(id) AS id, count(*) AS requests, min(at_ms) AS firstMs FROM ledger AS one
WHERE outcome <> 'ok' AND {{part}} AND (kind = 'network' OR (kind = 'call' AND NOT EXISTS (
  SELECT 1 FROM ledger AS other WHERE other.at_ms = one.at_ms AND other.kind = 'network'
    AND other.container_id = one.container_id AND other.outcome <> 'ok')))
GROUP BY pod_namespace, pod_name, pod_uid, command, CASE kind WHEN 'call' THEN '' ELSE network END,
  code, outcome, replace(error, container_id, '')
ORDER BY max(id) DESC

-- rows
SELECT id, at_ms AS atMs, kind, command, container_id AS containerId,
  pod_namespace AS podNamespace, pod_name AS podName, pod_uid AS podUid, network, plugin,
  ifname AS ifName, duration_us AS durationUs, outcome, code, error, addresses,
  config_hash AS configHash, decided_by AS decidedBy, rule, choice
FROM ledger WHERE {{part}} ORDER BY id DESC

-- attachments
SELECT container_id AS containerId, network, state, plan, result, error,
  substr(ifname, 1, instr(ifname || '/', '/') - 1) AS interface,
  created_at_ms AS createdAtMs, failed_at_ms AS failedAtMs, {{part}} AS policyAtMs
FROM attachments WHERE ?1 IS NULL OR network = ?1
ORDER BY created_at_ms, container_id, position

-- traffic
SELECT network, sum(bytes_per_second) FROM traffic WHERE bytes_per_second IS NOT NULL
GROUP BY network

-- policy
SELECT (SELECT min(alive_at_ms) FROM policy_watches) AS knownMs,
  (SELECT count(*) FROM rulesets) AS enforced

-- problems
SELECT at_ms AS atMs, kind, namespace, name, path, problem FROM policy_problems
ORDER BY at_ms DESC, namespace, name, path LIMIT ?

-- rulesets
-- Whole rows: an older record lacks the last column.
SELECT * FROM rulesets WHERE ?1 IS NULL OR (pod_namespace = ?1 AND pod_name = ?2)
ORDER BY at_ms DESC LIMIT ?3

-- states
SELECT network, state, count(*) AS value FROM attachments GROUP BY network, state
ORDER BY count(*) DESC

-- rows since
SELECT id, kind, command, outcome, code, network, duration_us AS durationUs FROM ledger
WHERE id > ? ORDER BY id LIMIT ?

-- statuses
SELECT container_id AS containerId, request_ifname AS requestIfName, annotations AS stored,
  pod_namespace AS namespace, pod_name AS name, pod_uid AS uid, at_ms AS atMs
FROM statuses ORDER BY at_ms LIMIT ?

-- newer sandbox
SELECT 1 FROM attachments WHERE container_id <> ?1 AND state = 'attached'
  AND created_at_ms > (SELECT max(created_at_ms) FROM attachments WHERE container_id = ?1)
  AND json_valid(plan) AND json_extract(plan, '$.pod.uid') = ?2
