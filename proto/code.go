package proto

import (
	"net/http"

	"connectrpc.com/connect"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Code is an error code; see error.proto for the meaning of each.
type Code = posternv1.ErrorCode

// The codes under shorter names.
const (
	CodeInternal             = posternv1.ErrorCode_ERROR_CODE_INTERNAL
	CodeInvalid              = posternv1.ErrorCode_ERROR_CODE_INVALID
	CodeUnauthenticated      = posternv1.ErrorCode_ERROR_CODE_UNAUTHENTICATED
	CodeRoleDenied           = posternv1.ErrorCode_ERROR_CODE_ROLE_DENIED
	CodePolicyDenied         = posternv1.ErrorCode_ERROR_CODE_POLICY_DENIED
	CodeNotFound             = posternv1.ErrorCode_ERROR_CODE_NOT_FOUND
	CodeAlreadyExists        = posternv1.ErrorCode_ERROR_CODE_ALREADY_EXISTS
	CodeAgentOffline         = posternv1.ErrorCode_ERROR_CODE_AGENT_OFFLINE
	CodeAgentLost            = posternv1.ErrorCode_ERROR_CODE_AGENT_LOST
	CodeCancelled            = posternv1.ErrorCode_ERROR_CODE_CANCELLED
	CodeTimeout              = posternv1.ErrorCode_ERROR_CODE_TIMEOUT
	CodeRowLimit             = posternv1.ErrorCode_ERROR_CODE_ROW_LIMIT
	CodeByteLimit            = posternv1.ErrorCode_ERROR_CODE_BYTE_LIMIT
	CodeBodyTooLarge         = posternv1.ErrorCode_ERROR_CODE_BODY_TOO_LARGE
	CodeRateLimited          = posternv1.ErrorCode_ERROR_CODE_RATE_LIMITED
	CodeOverloaded           = posternv1.ErrorCode_ERROR_CODE_OVERLOADED
	CodeUnavailable          = posternv1.ErrorCode_ERROR_CODE_UNAVAILABLE
	CodeSQL                  = posternv1.ErrorCode_ERROR_CODE_SQL
	CodeSourceUnreachable    = posternv1.ErrorCode_ERROR_CODE_SOURCE_UNREACHABLE
	CodeSourceCredentials    = posternv1.ErrorCode_ERROR_CODE_SOURCE_CREDENTIALS
	CodeSourceConfig         = posternv1.ErrorCode_ERROR_CODE_SOURCE_CONFIG
	CodeSQLSessionDied       = posternv1.ErrorCode_ERROR_CODE_SQL_SESSION_DIED
	CodeKeyMalformed         = posternv1.ErrorCode_ERROR_CODE_KEY_MALFORMED
	CodeKeyUnknown           = posternv1.ErrorCode_ERROR_CODE_KEY_UNKNOWN
	CodeKeyExpired           = posternv1.ErrorCode_ERROR_CODE_KEY_EXPIRED
	CodeKeyRevoked           = posternv1.ErrorCode_ERROR_CODE_KEY_REVOKED
	CodeKeyUsedUp            = posternv1.ErrorCode_ERROR_CODE_KEY_USED_UP
	CodeWrongControlPlane    = posternv1.ErrorCode_ERROR_CODE_WRONG_CONTROL_PLANE
	CodeClockSkew            = posternv1.ErrorCode_ERROR_CODE_CLOCK_SKEW
	CodeOrganizationDisabled = posternv1.ErrorCode_ERROR_CODE_ORGANIZATION_DISABLED
	CodeVersionMismatch      = posternv1.ErrorCode_ERROR_CODE_VERSION_MISMATCH
	CodeAgentRevoked         = posternv1.ErrorCode_ERROR_CODE_AGENT_REVOKED
	CodeIdentityExpired      = posternv1.ErrorCode_ERROR_CODE_IDENTITY_EXPIRED
	CodeStorageFull          = posternv1.ErrorCode_ERROR_CODE_STORAGE_FULL
)

// Exit codes of every command (DESIGN, "Command line").
const (
	ExitDone     = 0
	ExitFailed   = 1
	ExitUsage    = 2
	ExitDenied   = 3
	ExitNotFound = 4
	ExitOffline  = 5
)

// mapping is all that a code stands for outside this package.
type mapping struct {
	http    int
	connect connect.Code
	exit    int
	public  string
}

// mappings is the one place where codes become something else. The public
// message is what is sent when an error carries a code and no text.
var mappings = map[Code]mapping{
	CodeInternal:             {http.StatusInternalServerError, connect.CodeInternal, ExitFailed, "internal error: the detail is in the server's log"},
	CodeInvalid:              {http.StatusBadRequest, connect.CodeInvalidArgument, ExitFailed, "the request is not valid"},
	CodeUnauthenticated:      {http.StatusUnauthorized, connect.CodeUnauthenticated, ExitDenied, "no valid API token: run `postern login` or set POSTERN_TOKEN"},
	CodeRoleDenied:           {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the token's role does not allow this"},
	CodePolicyDenied:         {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the host's policy does not allow this"},
	CodeNotFound:             {http.StatusNotFound, connect.CodeNotFound, ExitNotFound, "not found"},
	CodeAlreadyExists:        {http.StatusConflict, connect.CodeAlreadyExists, ExitFailed, "it exists already"},
	CodeAgentOffline:         {http.StatusServiceUnavailable, connect.CodeUnavailable, ExitOffline, "the agent is offline"},
	CodeAgentLost:            {http.StatusBadGateway, connect.CodeUnavailable, ExitOffline, "the agent's tunnel went away while the request was under way"},
	CodeCancelled:            {499, connect.CodeCanceled, ExitFailed, "cancelled"},
	CodeTimeout:              {http.StatusGatewayTimeout, connect.CodeDeadlineExceeded, ExitFailed, "the time limit was reached"},
	CodeRowLimit:             {http.StatusUnprocessableEntity, connect.CodeResourceExhausted, ExitFailed, "the result has more rows than the limit"},
	CodeByteLimit:            {http.StatusUnprocessableEntity, connect.CodeResourceExhausted, ExitFailed, "the result has more bytes than the limit"},
	CodeBodyTooLarge:         {http.StatusRequestEntityTooLarge, connect.CodeResourceExhausted, ExitFailed, "the request body is over the limit"},
	CodeRateLimited:          {http.StatusTooManyRequests, connect.CodeResourceExhausted, ExitFailed, "too many requests: try again later"},
	CodeOverloaded:           {http.StatusServiceUnavailable, connect.CodeResourceExhausted, ExitFailed, "all places are taken: try again later"},
	CodeUnavailable:          {http.StatusServiceUnavailable, connect.CodeUnavailable, ExitFailed, "the server is going away: try again"},
	CodeSQL:                  {http.StatusUnprocessableEntity, connect.CodeFailedPrecondition, ExitFailed, "the database refused the statement"},
	CodeSourceUnreachable:    {http.StatusBadGateway, connect.CodeUnavailable, ExitFailed, "the database could not be reached from the host"},
	CodeSourceCredentials:    {http.StatusBadGateway, connect.CodeFailedPrecondition, ExitFailed, "the database refused the data source's credentials"},
	CodeSourceConfig:         {http.StatusBadGateway, connect.CodeFailedPrecondition, ExitFailed, "the data source's declaration on the host is wrong"},
	CodeSQLSessionDied:       {http.StatusBadGateway, connect.CodeAborted, ExitFailed, "the SQL session's process ended unexpectedly"},
	CodeKeyMalformed:         {http.StatusBadRequest, connect.CodeInvalidArgument, ExitFailed, "this is not a registration key"},
	CodeKeyUnknown:           {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the registration key is unknown"},
	CodeKeyExpired:           {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the registration key has expired: make a new one"},
	CodeKeyRevoked:           {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the registration key was revoked: make a new one"},
	CodeKeyUsedUp:            {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the registration key has no uses left: make a new one"},
	CodeWrongControlPlane:    {http.StatusForbidden, connect.CodeFailedPrecondition, ExitDenied, "the control plane's CA is not the one whose fingerprint the key carries"},
	CodeClockSkew:            {http.StatusBadRequest, connect.CodeFailedPrecondition, ExitFailed, "the clocks of the host and the control plane differ too much: mend time synchronisation"},
	CodeOrganizationDisabled: {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the organization is disabled"},
	CodeVersionMismatch:      {http.StatusUpgradeRequired, connect.CodeFailedPrecondition, ExitFailed, "agent and control plane have no protocol version in common: upgrade the older one"},
	CodeAgentRevoked:         {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the agent was revoked: register it again with a new key"},
	CodeIdentityExpired:      {http.StatusForbidden, connect.CodePermissionDenied, ExitDenied, "the agent's certificate expired beyond the grace period: register it again with a new key"},
	CodeStorageFull:          {http.StatusInsufficientStorage, connect.CodeResourceExhausted, ExitFailed, "no space is left on the server's storage"},
}

func mappingOf(code Code) mapping {
	if m, ok := mappings[code]; ok {
		return m
	}
	// A newer peer's code: all that can be said of it.
	return mappings[CodeInternal]
}

// HTTPStatus is the status for code.
func HTTPStatus(code Code) int { return mappingOf(code).http }

// ConnectCode is the Connect code for code.
func ConnectCode(code Code) connect.Code { return mappingOf(code).connect }

// PublicMessage is the sentence for code when an error has no text of its own.
func PublicMessage(code Code) string { return mappingOf(code).public }

// ExitCode is the exit code of a command that ended with err; 0 for nil.
func ExitCode(err error) int {
	if err == nil {
		return ExitDone
	}
	return mappingOf(CodeOf(err)).exit
}
