package api

import (
	"slices"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// roles, from the least to the most that a token may do. Each includes those
// before it.
var roles = []string{"viewer", "analyst", "operator", "admin"}

// needed is the least role for each procedure. What is not listed is refused.
var needed = map[string]string{
	posternv1connect.IdentityServiceWhoAmIProcedure: "viewer",
	posternv1connect.CAServiceShowCAProcedure:       "viewer",
	posternv1connect.CAServiceGetCAStatusProcedure:  "operator",
	posternv1connect.CAServiceRotateCAProcedure:     "admin",

	posternv1connect.MasterKeyServiceGetMasterKeyStatusProcedure:      "operator",
	posternv1connect.MasterKeyServiceRotateMasterKeyProcedure:         "admin",
	posternv1connect.MasterKeyServiceCancelMasterKeyRotationProcedure: "admin",
	posternv1connect.FileKeyServiceGetFileKeyStatusProcedure:          "operator",
	posternv1connect.FileKeyServiceRotateFileKeyProcedure:             "admin",

	posternv1connect.AgentServiceListAgentsProcedure:   "viewer",
	posternv1connect.AgentServiceGetAgentProcedure:     "viewer",
	posternv1connect.AgentServiceRevokeAgentProcedure:  "operator",
	posternv1connect.SourceServiceListSourcesProcedure: "viewer",
	posternv1connect.SourceServiceCheckSourceProcedure: "analyst",
	posternv1connect.SourceServiceIntrospectProcedure:  "analyst",

	runSQL: "analyst",
	posternv1connect.SessionServiceOpenSessionProcedure:                "analyst",
	posternv1connect.SessionServiceCloseSessionProcedure:               "analyst",
	posternv1connect.SessionServiceListSessionsProcedure:               "analyst",
	posternv1connect.KernelServiceListKernelSpecsProcedure:             "analyst",
	posternv1connect.KernelServiceStartKernelProcedure:                 "analyst",
	posternv1connect.KernelServiceListKernelsProcedure:                 "analyst",
	posternv1connect.KernelServiceGetKernelProcedure:                   "analyst",
	posternv1connect.KernelServiceInterruptKernelProcedure:             "analyst",
	posternv1connect.KernelServiceRestartKernelProcedure:               "analyst",
	posternv1connect.KernelServiceStopKernelProcedure:                  "analyst",
	posternv1connect.KernelCheckpointServiceCheckKernelProcedure:       "analyst",
	posternv1connect.KernelCheckpointServiceCheckpointKernelProcedure:  "analyst",
	posternv1connect.KernelCheckpointServiceSuspendKernelProcedure:     "analyst",
	posternv1connect.KernelCheckpointServiceResumeKernelProcedure:      "analyst",
	posternv1connect.KernelCheckpointServiceRollbackKernelProcedure:    "analyst",
	posternv1connect.KernelCheckpointServiceForkKernelProcedure:        "analyst",
	posternv1connect.KernelCheckpointServiceListCheckpointsProcedure:   "analyst",
	posternv1connect.KernelCheckpointServiceProtectCheckpointProcedure: "analyst",
	posternv1connect.KernelCheckpointServiceDeleteCheckpointProcedure:  "analyst",
	posternv1connect.SecretServiceSetSecretProcedure:                   "analyst",
	posternv1connect.SecretServiceListSecretsProcedure:                 "analyst",
	posternv1connect.SecretServiceRemoveSecretProcedure:                "analyst",
	posternv1connect.SecretServiceGrantSecretProcedure:                 "analyst",
	posternv1connect.KernelMoveServiceMoveKernelProcedure:              "analyst",
	posternv1connect.NotebookServiceRunNotebookProcedure:               "analyst",
	posternv1connect.NotebookServiceSyncNotebookProcedure:              "analyst",
	posternv1connect.NotebookServiceNotebookHistoryProcedure:           "analyst",
	posternv1connect.QueryServiceListQueriesProcedure:                  "analyst",
	posternv1connect.QueryServiceGetQueryProcedure:                     "analyst",
	posternv1connect.QueryServiceCancelQueryProcedure:                  "analyst",

	posternv1connect.FileServiceListWorkspacesProcedure:    "viewer",
	posternv1connect.FileServiceGetWorkspaceProcedure:      "viewer",
	posternv1connect.FileServiceGetFileProcedure:           "viewer",
	posternv1connect.FileServiceListFilesProcedure:         "viewer",
	posternv1connect.FileServiceListFileVersionsProcedure:  "viewer",
	posternv1connect.FileServiceListTrashProcedure:         "viewer",
	posternv1connect.FileServiceListConflictsProcedure:     "viewer",
	posternv1connect.FileServiceListSnapshotsProcedure:     "viewer",
	posternv1connect.FileServiceGetFileStatusProcedure:     "viewer",
	posternv1connect.FileServiceCreateWorkspaceProcedure:   "analyst",
	posternv1connect.FileServiceMakeDirectoryProcedure:     "analyst",
	posternv1connect.FileServiceMoveFileProcedure:          "analyst",
	posternv1connect.FileServiceRemoveFileProcedure:        "analyst",
	posternv1connect.FileServiceCommitFileProcedure:        "analyst",
	posternv1connect.FileServiceCommitFilesProcedure:       "analyst",
	posternv1connect.FileServiceMissingFileChunksProcedure: "analyst",
	posternv1connect.FileServiceRestoreFileProcedure:       "analyst",
	posternv1connect.FileServiceCreateSnapshotProcedure:    "analyst",
	posternv1connect.FileServiceRestoreSnapshotProcedure:   "analyst",
	posternv1connect.FileServiceEmptyTrashProcedure:        "operator",
	posternv1connect.FileServiceDeleteSnapshotProcedure:    "operator",
	posternv1connect.FileServiceUpdateWorkspaceProcedure:   "operator",
	posternv1connect.FileServiceDeleteWorkspaceProcedure:   "operator",
	readFiles:  "viewer",
	writeFiles: "analyst",

	posternv1connect.KeyServiceCreateKeyProcedure:     "operator",
	posternv1connect.KeyServiceListKeysProcedure:      "operator",
	posternv1connect.KeyServiceRevokeKeyProcedure:     "operator",
	posternv1connect.AuditServiceListAuditProcedure:   "operator",
	posternv1connect.AuditServiceVerifyAuditProcedure: "operator",
	agentMetrics: "operator",
	metrics:      "operator",

	posternv1connect.TokenServiceCreateTokenProcedure:                    "admin",
	posternv1connect.TokenServiceListTokensProcedure:                     "admin",
	posternv1connect.TokenServiceRevokeTokenProcedure:                    "admin",
	posternv1connect.TokenServiceRotateTokenProcedure:                    "admin",
	posternv1connect.OrganizationServiceCreateOrganizationProcedure:      "admin",
	posternv1connect.OrganizationServiceListOrganizationsProcedure:       "admin",
	posternv1connect.OrganizationServiceSetOrganizationDisabledProcedure: "admin",
}

// Names of what is not a Connect procedure, in the table above.
const (
	runSQL       = "run SQL"
	agentMetrics = "read an agent's metrics"
	metrics      = "read the metrics"
	readFiles    = "read files"
	writeFiles   = "write files"
)

// has reports whether role includes least.
func has(role, least string) bool {
	return slices.Contains(roles, role) && slices.Index(roles, role) >= slices.Index(roles, least)
}

// permit fails with ROLE_DENIED unless the caller's role includes what the
// procedure needs.
func permit(c Caller, procedure string) error {
	least, listed := needed[procedure]
	switch {
	case !listed:
		return proto.Errorf(proto.CodeNotFound, "no such procedure: %q", procedure)
	case !has(c.Role, least):
		return proto.Errorf(proto.CodeRoleDenied, "token %s has the role %s: this needs %s", c.TokenName, c.Role, least)
	}
	return nil
}
