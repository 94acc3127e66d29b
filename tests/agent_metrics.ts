/** The metrics that the agent of a node serves, with their labels. */
export const metrics = {
  genie_requests_total: ["command", "outcome", "code"],
  genie_request_duration_seconds_bucket: ["network", "command", "le"],
  genie_attachments: ["network"],
  /** `state` is "used" or "total"; total is absent where the IPAM tells none. */
  genie_addresses: ["network", "state"],
  genie_leaked_attachments: [],
  genie_policy_lag_seconds: [],
  genie_status_pending: [],
  genie_api_errors_total: [],
  genie_database_errors_total: [],
} as const;
